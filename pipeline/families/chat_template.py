"""A checkpoint's chat template, in the environment that transformers' `apply_chat_template` gives it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.families.files import read_chat_template, read_json
from pipeline.wire.errors import RequestError

Message = dict[str, Any]
FAILURES = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Refusal(Exception):
    """The template refused the messages, with its own message."""


class _Generation(Extension):
    """`{% generation %}` blocks tell a trainer which text is the assistant's: here they are their content."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """`special_tokens` are the tokenizer's own, by the names that templates call them.

    Raises ValueError for a template that is not valid.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source, self._special_tokens = source, dict(special_tokens or {})
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals |= {"raise_exception": _raise_refusal, "strftime_now": _strftime_now}
        try:
            self._template = self._environment.from_string(source)
            self._variables = frozenset(meta.find_undeclared_variables(self._environment.parse(source)))
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from None

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """Of a checkpoint; None where there is none."""
        source = read_chat_template(folder)
        return None if source is None else cls(source, _special_tokens(folder))

    def texts(self) -> set[str]:
        """The texts that the template writes, or looks for."""
        tree = self._environment.parse(self.source)
        written = {data.data for data in tree.find_all(nodes.TemplateData)}
        return written | {const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)}

    def names(self) -> set[str]:
        """The names by which the template reads its values."""
        tree = self._environment.parse(self.source)
        return {node.attr for node in tree.find_all(nodes.Getattr)}

    def variables(self) -> frozenset[str]:
        """The names that the template expects from outside."""
        return self._variables

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Raises RequestError for messages that the template refuses, or cannot render."""
        given = {**self._special_tokens, **(options or {})}
        try:
            # Templates ask for `tools` by its truth, or by its being defined.
            return self._template.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **given,
            )
        except _Refusal as refusal:
            what = f"the model's chat template refuses the messages: {refusal}"
            raise RequestError(what, field="messages") from None
        except FAILURES:
            what = "the model's chat template cannot render the messages"
            raise RequestError(what, field="messages") from None

    def render_open(
        self, messages: Sequence[Message], tools: Sequence[Any], options: Mapping[str, Any]
    ) -> str:
        """Ends behind the text of the final message, which the model goes on writing.

        As transformers does it: a tag behind that text shows where it ends. Where the template trims the
        text, its blanks at the end are left out, too. Raises RequestError.
        """
        tag = f"{secrets.token_hex(8)} "
        rendered = self.render([*messages[:-1], _tagged(messages[-1], tag)], tools, options, False)
        place = rendered.rfind(tag.strip())
        if place < 0:
            what = "the model's chat template leaves the final message out: it cannot be continued"
            raise RequestError(what, field="continue_final_message")
        before = rendered[:place]
        return before if rendered.startswith(tag, place) else before.rstrip()


def _tagged(message: Message, tag: str) -> Message:
    if isinstance(content := message["content"], str):
        return {**message, "content": content + tag}
    texts = [index for index, part in enumerate(content) if "text" in part]
    if not texts:
        what = "the final message has no text that could be continued"
        raise RequestError(what, field="continue_final_message")
    parts = [dict(part) for part in content]
    parts[texts[-1]]["text"] += tag
    return {**message, "content": parts}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """Unlike Jinja's own filter, without HTML's escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_refusal(reason: str) -> None:
    raise _Refusal(reason)


def _special_tokens(folder: Path) -> dict[str, str]:
    settings = read_json(folder / "tokenizer_config.json")
    found = {}
    for name in SPECIAL_NAMES:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
