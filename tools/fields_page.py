"""Writes docs/fields.md: every field of every request over HTTP, read off the structs that decode them.

python -m tools.fields_page            # a test says whether the page is up to date

Names, types, limits and defaults are the structs'; `field_meanings.py` says what a field is for.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from pipeline.wire.sampling import RANGES, SamplingParams
from tools.field_meanings import MEANINGS, OF_ROUTES
from workers.api.endpoints.registry import endpoints
from workers.api.sampling_fields import SamplingFields
from workers.api.unserved_fields import NEUTRAL

PAGE = Path(__file__).parents[1] / "docs" / "fields.md"
INTRODUCTION = """# All fields of requests

Written by `tools/fields_page.py` from the structs by which bodies are decoded: change those, not this page.
[api.md](api.md#fields) says what becomes of a field that is unknown, null or empty. `GET /openapi.json` of a
running server has the same for programs, and the answers.

A field without a default must be there. "the model's" means: as the checkpoint's `generation_config.json`
says, else the value behind it.
"""
SHARED = """## Fields of all routes that generate

`/v1/chat/completions`, `/v1/completions` and `/v1/responses` take these.
"""
UNSERVED = """## Fields of other servers

These would change the answer, and are not served: any other value than those shown is refused with a 400 that
names the field. `null` and empty values are taken everywhere.

| field | values that are taken |
| --- | --- |
"""
# What the checkpoint may set, in its generation_config.json.
OF_THE_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def page() -> str:
    shared = set(SamplingFields.__struct_fields__)
    parts = [INTRODUCTION, SHARED, _table(SamplingFields, (), shared)]
    for path, route in endpoints().items():
        names = set(route.fields.__struct_fields__)
        has_shared = shared <= names
        parts.append(f"\n## `POST {path}`\n")
        if has_shared:
            parts.append("The fields of all routes that generate, and:\n")
        parts.append(_table(route.fields, (path,), names - shared if has_shared else names))
    rows = (f"| `{name}` | {_values(neutral)} |" for name, neutral in NEUTRAL.items())
    return "\n".join([*parts, "", UNSERVED + "\n".join(rows), ""])


def _table(kind: type[msgspec.Struct], route: tuple[str, ...], names: set[str]) -> str:
    rows = [_row(field, route) for field in msgspec.structs.fields(kind) if field.encode_name in names]
    return "\n".join(["| field | value | default | |", "| --- | --- | --- | --- |", *rows])


def _row(field: msgspec.structs.FieldInfo, route: tuple[str, ...]) -> str:
    name = field.encode_name
    meaning = next((OF_ROUTES[path, name] for path in route if (path, name) in OF_ROUTES), None)
    return f"| `{name}` | {_value(field)} | {_default(field)} | {meaning or MEANINGS[name]} |"


def _value(field: msgspec.structs.FieldInfo) -> str:
    numbers = RANGES.get(field.encode_name)
    kinds = [kind for kind in _kinds(field.type) if kind != "null"]
    has_limits = numbers is not None and kinds and kinds[0] in ("number", "whole number")
    limits = f", {numbers.words}" if numbers is not None and has_limits else ""
    return " or ".join(kinds) + limits


def _kinds(kind: Any) -> Iterator[str]:
    """The names that JSON has for a type."""
    plain = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true, false",
        Any: "any",
        type(None): "null",
    }
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        for one in typing.get_args(kind):
            yield from _kinds(one)
    elif kind in plain:
        yield plain[kind]
    elif typing.get_origin(kind) is list:
        inner = next(_kinds(typing.get_args(kind)[0]))
        yield "list" if inner == "any" else f"list of {re.sub('y$', 'ie', inner)}s"
    else:  # a dict or a struct
        yield "object"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return ""
    name = field.encode_name
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if default is None and name in SamplingParams.__struct_fields__:
        default = SamplingParams().__getattribute__(name)
    if default is None or default in ((), {}, [], ""):
        return "none" if default is None else "empty"
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return f"the model's, {shown}" if name in OF_THE_MODEL else shown


def _values(neutral: typing.Sequence[object]) -> str:
    return ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in neutral)


if __name__ == "__main__":
    PAGE.write_text(page())
