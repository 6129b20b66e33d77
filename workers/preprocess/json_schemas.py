"""Rewrites a JSON schema into one that xgrammar serves in full, or refuses it by the name of a keyword.

xgrammar silently ignores some keywords, alone or beside others, and an answer could be invalid. What is
written here has only keywords that it heeds: types are told apart, `allOf` and keywords beside `$ref` or
`anyOf` are merged, annotations are dropped. An answer that fits the new schema fits the old one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.wire.errors import RequestError
from workers.preprocess.json_patterns import in_json, with_open_side
from workers.preprocess.schema_parts import (
    GROUPS,
    VALUES,
    NothingFits,
    Schema,
    are_disjoint,
    at,
    closed_by_itself,
    constraints_of,
    find,
    is_among,
    is_of,
    merge,
    types_of,
    unserved,
    values_of,
)
from workers.preprocess.string_formats import PATTERNS

UNSERVED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired",
    "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
MAX_DEPTH = 100  # of schemas in schemas
MAX_SCHEMAS = 20_000  # after merging
MAX_MULTIPLES = 1000  # of `multipleOf` within bounds: they are listed


def served(schema: Schema, is_json: bool = True) -> Schema:
    """The schema in xgrammar's terms. Raises RequestError without a field.

    Not `is_json`: strings stand there as they are, without JSON's escapes.
    """
    return _Writer(schema, is_json).document()


class _Writer:
    def __init__(self, root: Schema, is_json: bool) -> None:
        self._root, self._is_json = root, is_json
        self._numbers: dict[str, str] = {}  # of the pointers that are referred to
        # Equal strings are one definition: to compile a pattern again in each place takes 50 times as long.
        self._strings: dict[tuple[tuple[str, Schema], ...], str] = {}
        self._depth = self._num_schemas = 0

    def document(self) -> Schema:
        written, definitions = self._write(self._root, "#"), dict[str, Schema]()
        while len(definitions) < len(self._numbers):  # writing one may refer to more
            for reference, number in list(self._numbers.items())[len(definitions) :]:
                definitions[number] = self._write(find(self._root, reference, "#"), reference)
        definitions |= {name: dict(items) for items, name in self._strings.items()}
        return {**written, "$defs": definitions} if definitions else written

    def _write(self, schema: Schema, path: str) -> dict[str, Schema]:
        self._num_schemas += 1
        if self._depth > MAX_DEPTH or self._num_schemas > MAX_SCHEMAS:
            limits = f"{MAX_DEPTH} deep or has, with what it refers to, more than {MAX_SCHEMAS} parts"
            raise RequestError(f"the JSON schema is more than {limits}, at {path}")
        if schema is True:
            return {}
        if schema is False:
            raise NothingFits(f"the JSON schema at {path} allows nothing")
        if not isinstance(schema, dict):
            raise RequestError(f"the JSON schema at {path} is neither an object nor a boolean")
        _check_keywords(schema, path)
        self._depth += 1
        try:
            return self._write_dict(constraints_of(schema), path)
        finally:
            self._depth -= 1

    def _write_dict(self, schema: dict[str, Schema], path: str) -> dict[str, Schema]:
        if "$ref" in schema and len(schema) == 1:
            return {"$ref": self._define(schema["$ref"], path)}
        if "$ref" in schema or "allOf" in schema:
            return self._write(self._flat(schema, path), path)
        if any(name in schema for name in VALUES):
            return self._write_values(schema, path)
        if any(name in schema for name in GROUPS):
            return self._write_group(schema, path)
        types = types_of(schema, path)
        written = [self._write_type(kind, schema, path) for kind in types]
        return written[0] if len(written) == 1 else {"anyOf": written} if written else {}

    def _define(self, reference: Schema, path: str) -> str:
        find(self._root, reference, path)  # raises
        return f"#/$defs/{self._numbers.setdefault(reference, str(len(self._numbers)))}"

    def _flat(self, schema: Schema, path: str, depth: int = 0) -> Schema:
        """The schema without `$ref` and `allOf` at its top."""
        if not isinstance(schema, dict):
            return schema
        _check_keywords(schema, path)
        if depth > MAX_DEPTH:
            raise RequestError(f"the JSON schema at {path} refers to itself")
        parts: list[Schema] = [constraints_of(schema, "$ref", "allOf")]
        if "$ref" in schema:
            parts.append(find(self._root, schema["$ref"], path))
        if not isinstance(every := schema.get("allOf", []), list):
            raise RequestError(f"allOf of the JSON schema at {path} is no list")
        parts += every
        merged: dict[str, Schema] = {}
        for part in parts:
            flat = part
            if part is not parts[0]:
                flat = closed_by_itself(self._flat(part, path, depth + 1))
            if flat is False:
                raise NothingFits(f"the JSON schema at {path} allows nothing")
            merged = merge(merged, flat, path) if isinstance(flat, dict) else merged
        return merged

    def _write_values(self, schema: dict[str, Schema], path: str) -> dict[str, Schema]:
        values, types = values_of(schema), types_of(schema, path) if "type" in schema else ()
        if values is None:
            raise RequestError(f"enum of the JSON schema at {path} is no list")
        for name in schema:
            if name not in ("type", *VALUES):
                raise unserved(name, path, " beside enum or const")
        if "const" in schema and "enum" in schema:
            values = [value for value in values if is_among(value, schema["enum"])]
        fitting = [value for value in values if is_of(value, types)]
        if not fitting:
            raise NothingFits(f"no value of enum or const in the JSON schema at {path} fits")
        return {"enum": fitting}

    def _write_group(self, schema: dict[str, Schema], path: str) -> dict[str, Schema]:
        keyword = next(name for name in GROUPS if name in schema)
        beside, branches = constraints_of(schema, keyword), schema[keyword]
        if not isinstance(branches, list) or not branches:
            raise RequestError(f"{keyword} of the JSON schema at {path} is no list of schemas")
        if any(name in beside for name in GROUPS):
            raise unserved("oneOf", path, " beside anyOf")
        if keyword == "oneOf":
            flat = [self._flat(branch, at(path, keyword, index)) for index, branch in enumerate(branches)]
            if not are_disjoint(flat, path):
                raise unserved("oneOf", path, " where a value may fit two of its schemas: use anyOf")
        written: list[Schema] = []
        for index, branch in enumerate(branches):
            place = at(path, keyword, index)
            try:
                whole = {**beside, "allOf": [branch]} if beside else branch
                written.append(self._write(whole, place))
            except NothingFits as error:
                nothing = error
        if not written:
            raise nothing
        return {"anyOf": written}

    def _write_type(self, kind: str, schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
        match kind:
            case "object":
                return self._write_object(schema, path)
            case "array":
                return self._write_array(schema, path)
            case "string":
                return self._write_string(schema, path)
            case "number" | "integer":
                return _number(kind, schema, path)
            case _:
                return {"type": kind}

    def _write_string(self, schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
        written = _string(schema, path)
        if "pattern" in schema:
            written["pattern"] = self._pattern_of(schema["pattern"])
        if len(written) == 1 or not self._is_json:
            return written
        name = self._strings.setdefault(tuple(sorted(written.items())), f"s{len(self._strings)}")
        return {"$ref": f"#/$defs/{name}"}

    def _pattern_of(self, pattern: str) -> str:
        # Outside JSON a tag ends the string: what may be anything would take it in.
        return in_json(with_open_side(pattern)) if self._is_json else pattern

    def _write_array(self, schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
        items, prefix = schema.get("items"), schema.get("prefixItems", [])
        if isinstance(items, list):  # as before 2020-12
            prefix, items = items, schema.get("additionalItems")
        least, most = _count(schema, "minItems", path) or 0, _count(schema, "maxItems", path)
        if not isinstance(prefix, list):
            raise RequestError(f"prefixItems of the JSON schema at {path} is no list")
        if schema.get("unevaluatedItems", True) not in (True, {}):
            if schema["unevaluatedItems"] is not False or items not in (None, False):
                raise unserved("unevaluatedItems", path)
            items = False
        prefix = prefix if most is None else prefix[:most]
        if most is not None and (least > most or (items is False and least > len(prefix))):
            raise NothingFits(f"no number of items fits the JSON schema at {path}")
        written: dict[str, Schema] = {"type": "array"}
        if prefix:
            written["prefixItems"] = [
                self._write(one, at(path, "prefixItems", index)) for index, one in enumerate(prefix)
            ]
        is_full = len(prefix) == most
        if items is False or is_full or (prefix and items is None and least <= len(prefix)):
            written["items"] = False
        else:
            written["items"] = self._write(True if items is None else items, at(path, "items"))
        written |= {"minItems": least} if least else {}
        return written | ({"maxItems": most} if most is not None and not is_full else {})

    def _write_object(self, schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
        properties, required = _properties(schema, path), _required(schema, path)
        further = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        patterns = schema.get("patternProperties") or {}
        if not isinstance(patterns, dict):
            raise RequestError(f"patternProperties of the JSON schema at {path} is no object")
        is_closed = further is None or further is False
        for name in [name for name in properties if properties[name] is False]:
            if name in required or not is_closed:
                raise unserved(at("properties", name), path, ": it allows nothing")
            del properties[name]
        for name in [name for name in required if name not in properties]:
            if patterns or further is False:
                raise unserved("required", path, f": there is no property '{name}'")
            properties[name] = True if further is None else further
        written: dict[str, Schema] = {
            "type": "object",
            "properties": {
                name: self._write(value, at(path, "properties", name)) for name, value in properties.items()
            },
            "required": required,
        }
        if patterns:
            written["patternProperties"] = self._write_patterns(patterns, properties, path)
        elif not is_closed or (further is None and not schema.get("properties") and not required):
            written["additionalProperties"] = self._write(
                True if further is None else further, at(path, "additionalProperties")
            )
        if "propertyNames" in schema:
            if properties or patterns:
                raise unserved("propertyNames", path, " beside properties")
            written["propertyNames"] = self._write(schema["propertyNames"], at(path, "propertyNames"))
        written.setdefault("additionalProperties", False)
        return written | self._write_counts(schema, written, path)

    def _write_counts(
        self, schema: Mapping[str, Schema], written: Mapping[str, Schema], path: str
    ) -> dict[str, Schema]:
        least, most = _count(schema, "minProperties", path) or 0, _count(schema, "maxProperties", path)
        num_required = len(written["required"])
        if most is not None and (least > most or num_required > most):
            raise NothingFits(f"no number of properties fits the JSON schema at {path}")
        counts: dict[str, Schema] = {} if most is None else {"maxProperties": most}
        if least <= num_required:
            return counts
        is_open = written["additionalProperties"] is not False or "patternProperties" in written
        if is_open and least > 1:  # a name may come twice, and counts once
            raise unserved("minProperties", path, " beside properties without a name")
        if not is_open and least > len(written["properties"]):
            raise NothingFits(f"the JSON schema at {path} has fewer properties than minProperties")
        return counts | {"minProperties": least}

    def _write_patterns(
        self, patterns: dict[str, Schema], properties: Mapping[str, Schema], path: str
    ) -> dict[str, Schema]:
        if len(patterns) > 1:
            raise unserved("patternProperties", path, " with more than one pattern")
        (pattern, value), place = *patterns.items(), at(path, "patternProperties")
        try:
            matching = re.compile(pattern)
        except re.error:
            raise RequestError(f"the pattern of {place} is no regular expression") from None
        for name in properties:
            if matching.search(name) and properties[name] != value:
                raise unserved("patternProperties", path, f" where it matches the property '{name}'")
        return {self._pattern_of(pattern): self._write(value, at(place, pattern))}


def _check_keywords(schema: Mapping[str, Schema], path: str) -> None:
    for name in UNSERVED:
        if name in schema:
            raise unserved(name, path)
    if schema.get("uniqueItems"):
        raise unserved("uniqueItems", path)


def _properties(schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
    found = schema.get("properties", {})
    if not isinstance(found, dict):
        raise RequestError(f"properties of the JSON schema at {path} is no object")
    return dict(found)


def _required(schema: Mapping[str, Schema], path: str) -> list[str]:
    found = schema.get("required", [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RequestError(f"required of the JSON schema at {path} is no list of names")
    return list(dict.fromkeys(found))


def _count(schema: Mapping[str, Schema], keyword: str, path: str) -> int | None:
    value = schema.get(keyword)
    if value is None:
        return None
    if not is_of(value, ["integer"]) or value < 0:
        raise RequestError(f"{keyword} of the JSON schema at {path} is no count")
    return int(value)


def _string(schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
    """`format` is an annotation by the standard: where xgrammar cannot heed all, it is dropped first."""
    least, most = _count(schema, "minLength", path) or 0, _count(schema, "maxLength", path)
    has_bounds = least > 0 or most is not None
    if most is not None and least > most:
        raise NothingFits(f"no length fits the JSON schema at {path}")
    written: dict[str, Schema] = {"type": "string"}
    if (pattern := schema.get("pattern")) is not None:
        if not isinstance(pattern, str):
            raise RequestError(f"pattern of the JSON schema at {path} is no string")
        if has_bounds:
            raise unserved("minLength" if least else "maxLength", path, " beside pattern")
        return written | {"pattern": pattern}
    if (name := schema.get("format")) is not None and most is None and least <= 1:
        pattern = PATTERNS.get(name) if isinstance(name, str) else None
        return written | ({"format": name} if pattern is None else {"pattern": pattern})
    if not has_bounds:
        return written
    # For lengths xgrammar writes strings in which it allows control characters: not so for patterns.
    return written | {"pattern": f"^[\\s\\S]{{{least},{'' if most is None else most}}}$"}


def _number(kind: str, schema: Mapping[str, Schema], path: str) -> dict[str, Schema]:
    bounds: dict[str, Any] = {}
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = schema.get(name)
        if isinstance(value, bool) and name.startswith("exclusive"):  # as in draft 4
            if value and (plain := name.removeprefix("exclusive").lower()) in bounds:
                bounds[name] = bounds.pop(plain)
        elif value is not None:
            if not is_of(value, ["number"]):
                raise RequestError(f"{name} of the JSON schema at {path} is no number")
            bounds[name] = value
    multiple = schema.get("multipleOf")
    if kind == "integer":
        return _integer(bounds, multiple, path)
    if multiple is not None:
        raise unserved("multipleOf", path, " for numbers that are not integers")
    return {"type": kind, **bounds}


def _integer(bounds: Mapping[str, Any], multiple: Any, path: str) -> dict[str, Schema]:
    lows = [math.ceil(bounds[name]) for name in ("minimum",) if name in bounds]
    lows += [math.floor(bounds[name]) + 1 for name in ("exclusiveMinimum",) if name in bounds]
    highs = [math.floor(bounds[name]) for name in ("maximum",) if name in bounds]
    highs += [math.ceil(bounds[name]) - 1 for name in ("exclusiveMaximum",) if name in bounds]
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        raise NothingFits(f"no integer fits the JSON schema at {path}")
    written: dict[str, Schema] = {"type": "integer"}
    written |= {} if low is None else {"minimum": low}
    written |= {} if high is None else {"maximum": high}
    if multiple is None or multiple == 1:
        return written
    if not is_of(multiple, ["integer"]) or multiple <= 0:
        raise unserved("multipleOf", path, " unless it is a positive integer")
    step = int(multiple)
    if low is None and high is None:
        return written | {"multipleOf": step}
    if low is None or high is None or (high - low) // step > MAX_MULTIPLES:
        raise unserved("multipleOf", path, f" beside bounds unless at most {MAX_MULTIPLES} integers fit")
    values = list(range(-(-low // step) * step, high + 1, step))
    if not values:
        raise NothingFits(f"no integer fits the JSON schema at {path}")
    return {"enum": values}
