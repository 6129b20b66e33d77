"""Parts of JSON schemas: pointers into them, their types, and the merger of two that must both hold.

Pure. Values are as JSON gives them: a schema is a dict or a bool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from pipeline.wire.errors import RequestError, shown

Schema = Any
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# Which type of value each keyword is about.
KEYWORDS: dict[str, tuple[str, ...]] = {
    "object": (
        "properties", "required", "additionalProperties", "unevaluatedProperties", "patternProperties",
        "propertyNames", "minProperties", "maxProperties",
    ),
    "array": ("items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
VALUES = ("enum", "const")
GROUPS = ("anyOf", "oneOf")
CONSTRAINTS = {name for names in KEYWORDS.values() for name in names} | {
    "type", "$ref", "allOf", *VALUES, *GROUPS
}  # fmt: skip
LARGER_HOLDS = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
SMALLER_HOLDS = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}


class NothingFits(RequestError):
    """No value can be valid."""


def unserved(keyword: str, path: str, why: str = "") -> RequestError:
    return RequestError(f"the keyword '{keyword}' of the JSON schema at {path} is not served{why}")


def at(path: str, *names: str | int) -> str:
    """The JSON pointer of a part of the schema at `path`."""
    parts = (str(name).replace("~", "~0").replace("/", "~1") for name in names)
    return "/".join((path, *parts))


def find(root: Schema, reference: object, path: str) -> Schema:
    """The schema that a `$ref` at `path` means. Raises RequestError for one outside this schema."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise unserved("$ref", path, f": {shown(reference)} is no pointer within the schema")
    found = root
    for part in reference.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise RequestError(f"the JSON schema at {path} refers to {shown(reference)}, which is not there")
    return found


def constraints_of(schema: Mapping[str, Schema], *without: str) -> dict[str, Schema]:
    """The keywords that restrict values; all others are annotations."""
    return {name: schema[name] for name in schema if name in CONSTRAINTS and name not in without}


def types_of(schema: Mapping[str, Schema], path: str) -> tuple[str, ...]:
    """The types that the schema names, else those that its keywords are about; empty: any type."""
    named = schema.get("type")
    if named is None:
        return tuple(kind for kind, names in KEYWORDS.items() if any(name in schema for name in names))
    listed = named if isinstance(named, list) else [named]
    for kind in listed:
        if kind not in TYPES:
            raise RequestError(f"the JSON schema at {path} has the unknown type {shown(kind)}")
    if not listed:
        raise NothingFits(f"the JSON schema at {path} has no type")
    return tuple(dict.fromkeys(kind for kind in listed if kind != "integer" or "number" not in listed))


def is_of(value: object, types: Sequence[str]) -> bool:
    return not types or any(_IS_OF[kind](value) for kind in types)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_IS_OF: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def merge(one: Mapping[str, Schema], other: Mapping[str, Schema], path: str) -> dict[str, Schema]:
    """A schema for the values that fit both, neither of which has `$ref` or `allOf` at its top.

    Raises NothingFits where types or values contradict each other, RequestError for keywords that no one
    schema can say together.
    """
    _check_closed(one, other, path)
    _check_closed(other, one, path)
    merged = constraints_of(one)
    for name, value in constraints_of(other).items():
        if name not in merged or _same(merged[name], value):
            merged[name] = value
        else:
            merged[name] = _merge_values(name, merged[name], value, path)
    return merged


def _merge_values(name: str, one: Schema, other: Schema, path: str) -> Schema:
    if name in LARGER_HOLDS | SMALLER_HOLDS and _is_number(one) and _is_number(other):
        return (max if name in LARGER_HOLDS else min)(one, other)
    if name == "required" and isinstance(one, list) and isinstance(other, list):
        return list(dict.fromkeys([*map(str, one), *map(str, other)]))
    if name == "properties" and isinstance(one, dict) and isinstance(other, dict):
        both = {key: {"allOf": [one[key], other[key]]} for key in one if key in other}
        return {**one, **other, **both}
    if name == "items":
        return {"allOf": [one, other]}
    if name == "unevaluatedProperties" and False in (one, other):
        return False
    if name == "type":
        return _common_types(types_of({"type": one}, path), types_of({"type": other}, path), path)
    if name == "const" or (name == "enum" and isinstance(one, list) and isinstance(other, list)):
        common = [value for value in one if is_among(value, other)] if name == "enum" else []
        if not common:
            raise NothingFits(f"no value fits all of the JSON schema at {path}")
        return common
    raise unserved(name, path, " twice for one value")


def _common_types(one: Sequence[str], other: Sequence[str], path: str) -> list[str]:
    narrow = {"integer"} if {"integer", "number"} & {*one} and {"integer", "number"} & {*other} else set()
    if "number" in one and "number" in other:
        narrow = {"number"}
    common = [kind for kind in TYPES if kind in narrow or (kind in one and kind in other)]
    if not common:
        raise NothingFits(f"no type fits all of the JSON schema at {path}")
    return common


def _check_closed(one: Mapping[str, Schema], other: Mapping[str, Schema], path: str) -> None:
    """What one schema says of properties and items that it does not name holds for those that only the other
    names."""
    (prefix, further), (other_prefix, _) = _items_of(one), _items_of(other)
    if further not in (None, True, {}) and len(prefix) < len(other_prefix):
        raise unserved("items", path, " where a further prefixItems is added")
    names, others = one.get("properties") or {}, other.get("properties") or {}
    for keyword in ("additionalProperties", "patternProperties", "propertyNames"):
        is_free = one.get(keyword, True) in (True, {})
        if not is_free and any(name not in names for name in others):
            raise unserved(keyword, path, " where further properties are added")


def _items_of(schema: Mapping[str, Schema]) -> tuple[Sequence[Schema], Schema]:
    """The schemas of the first items, and that of all further ones."""
    items, prefix = schema.get("items"), schema.get("prefixItems")
    if isinstance(items, list):  # as before 2020-12
        return items, schema.get("additionalItems")
    return prefix if isinstance(prefix, list) else (), items


def closed_by_itself(part: Schema) -> Schema:
    """A part of `allOf`, or what a `$ref` means, with what is unevaluated in it said in words that count
    beside other parts: it does not see what these name."""
    if not isinstance(part, dict):
        return part
    closed = {name: part[name] for name in part if not name.startswith("unevaluated")}
    if "unevaluatedProperties" in part:
        closed.setdefault("additionalProperties", part["unevaluatedProperties"])
    if "unevaluatedItems" in part:
        further = "additionalItems" if isinstance(part.get("items"), list) else "items"
        closed.setdefault(further, part["unevaluatedItems"])
    return closed


def are_disjoint(branches: Sequence[Schema], path: str) -> bool:
    """Whether no value can fit two of the branches, for certain; none has `$ref` or `allOf` at its top."""
    return all(_are_apart(one, other, path) for one, other in combinations(branches, 2))


def _are_apart(one: Schema, other: Schema, path: str) -> bool:
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    values, others = values_of(one), values_of(other)
    if values is not None and others is not None:
        return not any(is_among(value, others) for value in values)
    types, other_types = (types_of(each, path) if "type" in each else () for each in (one, other))
    if values is not None:
        return bool(other_types) and not any(is_of(value, other_types) for value in values)
    if others is not None:
        return bool(types) and not any(is_of(value, types) for value in others)
    try:
        common = _common_types(types, other_types, path) if types and other_types else None
    except NothingFits:
        return True
    # Without a type, values of other types than its keywords' fit too; but only these types are written.
    are_objects = types_of(one, path) == types_of(other, path) == ("object",)
    return (common == ["object"] or are_objects) and _differ_in_a_property(one, other)


def _differ_in_a_property(one: Mapping[str, Schema], other: Mapping[str, Schema]) -> bool:
    """Both require a property, with different values: a discriminator."""
    for name in one.get("required") or ():
        if name in (other.get("required") or ()):
            mine, theirs = (values_of((schema.get("properties") or {}).get(name)) for schema in (one, other))
            if mine is not None and theirs is not None and not any(is_among(each, theirs) for each in mine):
                return True
    return False


def values_of(schema: Schema) -> list[Any] | None:
    """The values that the schema lists; None: it lists none."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    found = schema.get("enum")
    return found if isinstance(found, list) else None


def _same(one: object, other: object) -> bool:
    """As JSON has it: true is not 1."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def is_among(value: object, values: Sequence[object]) -> bool:
    return any(_same(value, other) for other in values)
