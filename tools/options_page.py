"""Writes docs/options.md: every option of the command line, read off the configuration's dataclasses.

python -m tools.options_page            # a test says whether the page is up to date
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
# Of each section of the command line: what it is about, in words.
SECTIONS = {
    "model": "The model",
    "api": "The HTTP server",
    "direct": "Clients on other machines, over ZeroMQ",
    "preprocess": "Requests and their media",
    "vit": "The vision encoders",
    "llm": "The language model",
    "carrier": "Tensors between nodes",
    "launcher": "All processes",
    "cluster": "Several machines",
}
LEFT_OUT = ("fault",)  # for tests
INTRODUCTION = """# All options

Written by `tools/options_page.py` from the dataclasses in `pipeline/config/`, of which
`python -m launcher --help` is made, too: change those, not this page. An unknown option, or a value out of
range, ends the start with an error that names the option. API keys may also come from the variable
`VLM_API_KEY` ([security.md](security.md)).
"""


def page() -> str:
    parts = [INTRODUCTION]
    hints = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        rows = "\n".join(_rows(hints[section.name]))
        parts.append(f"## {SECTIONS[section.name]}\n\n| option | default | |\n| --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


def _rows(role: type) -> Iterator[str]:
    hints = typing.get_type_hints(role)
    for field in dataclasses.fields(role):
        if not field.metadata or field.name in LEFT_OUT:
            continue
        names = [f"--{field.name.replace('_', '-')}", *field.metadata["aliases"]]
        if hints[field.name] is bool and field.default:
            names.append(f"--no-{field.name.replace('_', '-')}")
        value = _value(field, hints[field.name])
        shown = "<br>".join(f"`{name}{value if name == names[0] else ''}`" for name in names)
        choices = ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
        text = field.metadata["help"] + (f". One of {choices}" if choices else "")
        yield f"| {shown} | {_default(field.default)} | {text} |"


def _value(field: dataclasses.Field[object], hint: object) -> str:
    """What stands behind the option's name."""
    if hint is bool:
        return ""
    plain = (
        next(kind for kind in typing.get_args(hint) if kind is not type(None)) if _may_be_none(hint) else hint
    )
    word = "NAME" if field.metadata["choices"] else field.metadata["metavar"] or field.name.upper()
    return f" {word} …" if typing.get_origin(plain) is tuple else f" {word}"


def _may_be_none(hint: object) -> bool:
    return isinstance(hint, types.UnionType)


def _default(value: object) -> str:
    if value in (None, "", ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
