"""Which metrics a PromQL expression reads, and how: as much of the language as dashboards and alerts need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

TOKEN = re.compile(
    r'\s*(?P<text>"(?:[^"\\]|\\.)*"|[A-Za-z_:][\w:]*|\d+(?:\.\d+)?(?![A-Za-z_])|=~|!=|!~|==|>=|<=|.)',
    re.DOTALL,
)
WORDS = {"and", "or", "unless", "on", "ignoring", "group_left", "group_right", "offset", "bool"}
GROUPING = {"by", "without"}


class Use(NamedTuple):
    """A metric in an expression."""

    name: str
    matched: tuple[str, ...]  # labels in its braces
    grouped: tuple[str, ...]  # labels by which the aggregations around it group
    functions: tuple[str, ...]  # around it, the outermost first
    is_range: bool


@dataclass
class _Call:
    function: str
    labels: list[str] = field(default_factory=list)


def uses(expression: str) -> list[Use]:
    return list(_Reader(expression).read())


class _Reader:
    def __init__(self, expression: str) -> None:
        self._tokens = [found for found in TOKEN.findall(expression) if found.strip()]
        self._place = 0
        self._calls: list[_Call] = []

    def _peek(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._place += 1
        return token

    def read(self) -> Iterator[Use]:
        while token := self._take():
            if token == "(":
                self._calls.append(_Call(""))
            elif token == ")":
                self._calls.pop()
            elif re.match(r"[A-Za-z_:]", token) and token not in WORDS:
                if self._peek() == "(" or self._peek() in GROUPING:
                    self._begin(token)
                else:
                    yield self._metric(token)
        assert not self._calls, "a parenthesis is open"

    def _begin(self, function: str) -> None:
        call = _Call(function)
        if self._peek() in GROUPING:
            self._take()
            call.labels = self._until("(", ")")
        assert self._take() == "(", f"{function} has no arguments"
        self._calls.append(call)

    def _until(self, opening: str, closing: str) -> list[str]:
        assert self._take() == opening
        found: list[str] = []
        while (token := self._take()) != closing:
            assert token, f"{opening} is not closed"
            if token != ",":
                found.append(token)
        return found

    def _metric(self, name: str) -> Use:
        matched = self._until("{", "}")[::3] if self._peek() == "{" else []
        is_range = self._peek() == "["
        if is_range:
            self._until("[", "]")
        grouped = [label for call in self._calls for label in call.labels]
        functions = tuple(call.function for call in self._calls if call.function)
        return Use(name, tuple(matched), tuple(grouped), functions, is_range)


def check(use: Use, kinds: dict[str, str], labels: dict[str, set[str]]) -> None:
    """`kinds`: by a sample's name, the type of its family. `labels`: by a sample's name."""
    assert use.name in kinds, f"no metric {use.name}"
    counts_up = kinds[use.name] == "counter" or use.name.endswith(("_bucket", "_sum", "_count"))
    innermost = use.functions[-1] if use.functions else ""
    assert use.is_range == (innermost in ("rate", "increase")), f"{use.name}: a rate needs a range"
    assert use.is_range == counts_up, f"{use.name} is a {kinds[use.name]}: rates are of what counts up"
    is_bucket = use.name.endswith("_bucket")
    assert is_bucket == ("histogram_quantile" in use.functions), f"{use.name}: quantiles are of buckets"
    assert not is_bucket or "le" in use.grouped, f"{use.name}: quantiles need le"
    known = labels[use.name] | {"instance", "job"}  # which the scrape adds
    assert set(use.matched) | set(use.grouped) <= known, f"{use.name} has only {sorted(known)}"
