"""Words of JSON Schema: how the description says what a field may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.wire.sampling import MAX_INT32
from workers.api import parts

Json = dict[str, Any]
SHARED: dict[str, Json] = {}  # schemas that many fields refer to, by name
REFERENCE = "#/components/schemas/{name}"
EMPTY: tuple[object, ...] = (None, "", [], {})  # what `is_unset` takes for a field left out
FALSY = (*EMPTY, 0, False)
UNSET: Json = {"enum": list(EMPTY)}
NULL: Json = {"type": "null"}
TEXT: Json = {"type": "string"}
NAME: Json = {"type": "string", "minLength": 1}
OBJECT: Json = {"type": "object"}
NUMBER: Json = {"type": "number", "minimum": 1 - int(parts.MAX_NUMBER), "maximum": int(parts.MAX_NUMBER) - 1}
TOKEN_ID: Json = {"type": "integer", "minimum": 0, "maximum": MAX_INT32 - 1}


def any_of(*schemas: Json) -> Json:
    return {"anyOf": list(schemas)}


def one_of(values: Iterable[object]) -> Json:
    return {"enum": list(values)}


def listed(items: Json, **limits: int) -> Json:
    return {"type": "array", "items": items, **limits}


def ref(name: str) -> Json:
    return {"$ref": REFERENCE.format(name=name)}


def optional(schema: Json) -> Json:
    """A schema that is referred to says for itself what is empty."""
    return schema if "$ref" in schema else any_of(schema, UNSET)


SHARED["Number"] = optional(NUMBER)
SHARED["Whole"] = optional({**NUMBER, "type": "integer"})
SHARED["Numbers"] = optional(listed(NUMBER))
SETTINGS = {"area": ref("Number"), "real": ref("Number"), "whole": ref("Whole"), "reals": ref("Numbers")}


def opened(required: Mapping[str, Json], further: Mapping[str, Json] | None = None) -> Json:
    """An object that may have other keys."""
    return {"type": "object", "properties": {**required, **(further or {})}, "required": list(required)}


def closed(
    required: Mapping[str, Json], further: Mapping[str, Json] | None = None, ignored: Iterable[str] = ()
) -> Json:
    """An object whose other keys must be empty, but for those that are ignored. `further` may be, too."""
    known = {**required, **{name: optional(schema) for name, schema in (further or {}).items()}}
    others: dict[str, Json] = {name: {} for name in sorted(ignored) if name not in known}
    schema = opened({**known, **others})
    return {**schema, "required": list(required), "additionalProperties": UNSET}


def untyped(schema: Json) -> Json:
    """The object without its type: `type` must not be empty but null or left out."""
    return {**schema, "properties": {**schema["properties"], "type": NULL}}
