"""Sends a server what its own description, `/openapi.json`, allows and what it forbids, and holds the answers
against that description. The requests are schemathesis's.

    python -m launcher --max-model-len 1024 &
    python -m tools.schema_attack http://127.0.0.1:8000 --examples 300 --seed 1

The checks are schemathesis's, but for one. What a schema allows cannot always be served: fields contradict
each other, a prompt exceeds the context, a URL leads nowhere, a grammar does not compile. So a body that fits
may be refused, but not for its shape: not with the words by which a field's type is refused, nor a field that
is unknown.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode
from schemathesis.checks import negative_data_rejection, not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from workers.api.operations import LANES

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
OVERLOADED = 503  # the one status of 5xx that is an answer
SHAPE = re.compile(r"Expected `|Object (missing|contains)|unknown|is no type|must be (a|an) |must be one of")
# Answers are short: a context is long, and a request must not take a second.
SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ANSWER_S = 90.0
MAX_SHOWN = 600


@dataclass
class Conformance:
    statuses: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # by operation and mode
    # What was wrong, and the shortest request for which it was.
    violations: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, request: str) -> None:
        if len(request) < len(self.violations.get(what, request + " ")):
            self.violations[what] = request


def attack(url: str, key: str, num_examples: int, seed: int) -> Conformance:
    """`url`: without `/v1`. `num_examples`: of each operation with a body, of what is allowed, and of what is
    forbidden."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    found = Conformance()
    with requests.Session() as session:
        session.headers.update(headers)
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            operation = result.ok()
            if operation.path == LANES:  # its answer never ends
                continue
            count = num_examples if operation.body else min(num_examples, 5)
            modes = tuple(GenerationMode) if operation.body else (GenerationMode.POSITIVE,)
            for mode in modes:
                _run(operation.as_strategy(generation_mode=mode), _sender(session, found, mode), count, seed)
    return found


def _run(strategy: Any, send: Callable[[Any], None], num_examples: int, seed: int) -> None:
    @seeded(seed)
    @settings(
        max_examples=num_examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def examples(case: Any) -> None:
        send(case)

    examples()


def _sender(session: requests.Session, found: Conformance, mode: GenerationMode) -> Callable[[Any], None]:
    def send(case: Any) -> None:
        _shorten(case.body)
        response = case.call(session=session, timeout=ANSWER_S)
        found.statuses[case.operation.label, mode.value, response.status_code] += 1
        if response.status_code == OVERLOADED:
            return
        said = response.content.decode(errors="replace")
        request = f"{case.as_curl_command()[:MAX_SHOWN]}\n    -> {response.status_code} {said[:MAX_SHOWN]}"
        try:
            case.validate_response(response, checks=list(CHECKS))
        except FailureGroup as failures:
            for failure in failures.exceptions:
                found.note(f"{case.operation.label} ({mode.value}): {failure.title}", request)
        if mode is GenerationMode.POSITIVE and response.status_code == 400:
            message = _message(said)
            if SHAPE.search(message):
                found.note(f"{case.operation.label}: refused for its shape: {message[:60]}", request)

    return send


def _shorten(body: object) -> None:
    if not isinstance(body, dict):
        return
    for name in SHORT:
        if isinstance(body.get(name), int) and body[name] > 2:
            body[name] = 2
    if not any(body.get(name) for name in SHORT):
        body.update(dict.fromkeys(SHORT[:1] if "input" not in body else SHORT[2:], 2))


def _message(said: str) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""  # another check says so


def table(found: Conformance) -> str:
    """How many requests of each operation had which status, as Markdown."""
    lines = ["| operation | allowed | forbidden |", "| --- | --- | --- |"]
    for label in dict.fromkeys(label for label, _, _ in found.statuses):
        cells = []
        for mode in GenerationMode:
            told = {
                status: n
                for (one, of, status), n in found.statuses.items()
                if (one, of) == (label, mode.value)
            }
            cells.append(", ".join(f"{status}: {count}" for status, count in sorted(told.items())))
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"{sum(found.statuses.values())} requests, {len(found.violations)} violations"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", metavar="URL", help="of the server, without /v1")
    parser.add_argument("--key", default="")
    parser.add_argument("--examples", type=int, default=300, help="of each operation, allowed and forbidden")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found = attack(args.url.rstrip("/"), args.key, args.examples, args.seed)
    print(table(found))
    for what, request in found.violations.items():
        print(f"\n- {what}\n    {request}")
    return int(bool(found.violations))


if __name__ == "__main__":
    sys.exit(main())
