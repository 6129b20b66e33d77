"""Keys of objects within a body: of parts, blocks and items, which stay untyped until they are read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from pipeline.wire.errors import RequestError, shown
from workers.api.json_bodies import is_unset


def text_of(given: Mapping[str, Any], name: str, field: str) -> str:
    """Raises RequestError, naming the key below `field`, for a value that is no text."""
    text = given.get(name)
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a text, got {shown(text)}", field=f"{field}.{name}")
    return text


def refuse_unserved_keys(
    given: Mapping[str, Any], served: Container[str], ignored: Container[str], where: str, field: str
) -> None:
    """Raises RequestError, naming the key below `field`, for one that is set and would change the answer."""
    for name, value in given.items():
        if name not in served and name not in ignored and not is_unset(value):
            what = f"{shown(name)} in {where} is not served by this server"
            raise RequestError(what, field=f"{field}.{name}")
