"""Which JSON schemas are served: what the grammar accepts is valid by another implementation."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from pipeline.wire.errors import RequestError
from tests.grammars import compiler, schema_of, vocabulary
from workers.grammars.binding import load_binding
from workers.grammars.compiled import unpack
from workers.preprocess.grammar_process import Compiled
from workers.preprocess.json_schemas import served

STRING, INT = {"type": "string"}, {"type": "integer"}
# The place at which each is refused, and the keyword or word that the message has.
REFUSED: dict[str, tuple[Any, str, str]] = {
    "not": ({"type": "object", "properties": {"a": {"not": {}}}}, "not", "#/properties/a"),
    "uniqueItems": ({"type": "array", "items": INT, "uniqueItems": True}, "uniqueItems", "#"),
    "contains": ({"items": {"type": "array", "contains": {"const": 7}}}, "contains", "#/items"),
    "if": ({"anyOf": [STRING, {"if": {"required": ["a"]}, "then": {"required": ["b"]}}]}, "if", "#/anyOf/1"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "dependentRequired", "#"),
    "dependentSchemas": ({"allOf": [{"dependentSchemas": {"a": {}}}]}, "dependentSchemas", "#"),
    "multipleOf beside bounds": ({"type": "integer", "multipleOf": 3, "minimum": 5}, "multipleOf", "#"),
    "multipleOf of a fraction": ({"type": "number", "multipleOf": 0.5}, "multipleOf", "#"),
    "a remote reference": ({"$ref": "http://x.y/z"}, "$ref", "#"),
    "an anchor": ({"properties": {"a/b": {"$ref": "#foo"}}}, "$ref", "#/properties/a~1b"),
    "a missing reference": ({"$ref": "#/$defs/zz"}, "#/$defs/zz", "#"),
    "a dynamic reference": ({"$dynamicRef": "#x"}, "$dynamicRef", "#"),
    "oneOf that overlaps": ({"oneOf": [INT, {"type": "number"}]}, "oneOf", "#"),
    "oneOf without a type": ({"oneOf": [STRING, {"minimum": 5}]}, "oneOf", "#"),
    "pattern and length": ({"type": "string", "pattern": "^a+$", "minLength": 3}, "minLength", "#"),
    "a bound beside enum": ({"enum": [1, 30], "maximum": 5}, "maximum", "#"),
    "two patterns": ({"patternProperties": {"^a": INT, "b$": STRING}}, "patternProperties", "#"),
    "a pattern of a property": (
        {"properties": {"ab": STRING}, "patternProperties": {"^a": INT}},
        "patternProperties",
        "#",
    ),
    "propertyNames beside properties": (
        {"properties": {"b": INT}, "propertyNames": STRING},
        "propertyNames",
        "#",
    ),
    "minProperties of any names": ({"type": "object", "minProperties": 2}, "minProperties", "#"),
    "required but not allowed": (
        {"properties": {"a": INT}, "required": ["z"], "additionalProperties": False},
        "required",
        "#",
    ),
    "closed parts": (
        {"allOf": [{"properties": {"a": INT}, "additionalProperties": False}, {"properties": {"b": INT}}]},
        "additionalProperties",
        "#",
    ),
    "further first items": ({"allOf": [{"prefixItems": [{}]}, {"items": INT}]}, "items", "#"),
    "no further items": ({"prefixItems": [INT], "allOf": [{"items": False}]}, "items", "#"),
    "what a part alone does not evaluate": (
        {"allOf": [{"properties": {"a": INT}}, {"properties": {"b": INT}, "unevaluatedProperties": False}]},
        "additionalProperties",
        "#",
    ),
    "items that a part alone does not evaluate": (
        {"allOf": [{"prefixItems": [INT]}, {"unevaluatedItems": False}]},
        "items",
        "#",
    ),
    "true for 1": ({"const": True, "enum": [1]}, "enum", "#"),
    "true for 1 in a list": ({"allOf": [{"enum": [[True]]}, {"enum": [[1]]}]}, "fits", "#"),
    "itself": ({"allOf": [{"$ref": "#"}]}, "itself", "#"),
    "nothing": ({"properties": {"a": False}, "required": ["a"]}, "properties/a", "#"),
    "false": (False, "allows nothing", "#"),
    "an empty enum": ({"enum": []}, "enum", "#"),
    "values of another type": ({"type": "string", "enum": [1]}, "enum", "#"),
    "an unknown type": ({"items": {"type": "foo"}}, "foo", "#/items"),
    "bounds": ({"type": "integer", "minimum": 5, "maximum": 3}, "integer", "#"),
    "lengths": ({"type": "string", "minLength": 5, "maxLength": 3}, "length", "#"),
    "numbers of items": ({"type": "array", "minItems": 5, "maxItems": 3}, "items", "#"),
    "numbers of properties": ({"required": ["a", "b"], "maxProperties": 1}, "properties", "#"),
    "no schema": ({"items": 5}, "neither", "#/items"),
    "no list": ({"anyOf": {}}, "anyOf", "#"),
}
# A value that fits and is accepted, and values that do not fit.
SERVED: dict[str, tuple[Any, Any, list[Any]]] = {
    "any": ({}, {"a": [1, None]}, []),
    "annotations": ({"title": "t", "default": 1, "$comment": "", "examples": [], "x": 1, **INT}, 5, ["a"]),
    "an unknown format": ({"type": "string", "format": "zzz"}, "x", [1]),
    "a bounded string": ({"type": "string", "minLength": 2, "maxLength": 3}, "ab", ["a", "abcd"]),
    "format and length": ({"type": "string", "format": "uri", "maxLength": 4}, "a", ["abcde"]),
    "dates": ({"type": "string", "format": "date"}, "2024-02-29", ["2023-02-29", "2024-04-31", "x"]),
    "times": ({"type": "string", "format": "date-time"}, "2024-12-31T23:59:59Z", ["2024-12-31T24:00:00Z"]),
    "addresses": ({"type": "string", "format": "ipv4"}, "10.0.255.1", ["10.0.256.1", "10.01.2.3"]),
    "a part of a pattern": ({"type": "string", "pattern": "a"}, "a", ["b"]),
    "an escape in a pattern": ({"type": "string", "pattern": r"^C:\\\S+\n[^a-]$"}, "C:\\x\nb", ["C:x\nb"]),
    "quotes in a pattern": ({"type": "string", "pattern": '^"[^-]\\W?"$'}, '"x"', ["x"]),
    "an escape in a name": (
        {"type": "object", "patternProperties": {'^a"b$': INT}},
        {'a"b': 1},
        [{'a"b': "x"}],
    ),
    "a type by its keyword": ({"minimum": 5}, 6, [4]),
    "properties without type": ({"properties": {"a": INT}, "required": ["a"]}, {"a": 1}, [{"a": "x"}, {}]),
    "required without properties": ({"required": ["z"]}, {"z": 1}, [{"a": 1}]),
    "types": ({"type": ["integer", "null"], "minimum": 5}, None, [3]),
    "exclusive bounds": ({"type": "integer", "exclusiveMinimum": 4.5, "maximum": 6.5}, 5, [4, 7]),
    "draft 4's bounds": ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, 6, []),
    "multiples": ({"type": "integer", "multipleOf": 7}, 21, [20]),
    "multiples within bounds": (
        {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 20},
        14,
        [21, 0, 8],
    ),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, 4, [9, 2]),
    "allOf of objects": (
        {
            "allOf": [
                {"properties": {"a": INT}, "required": ["a"]},
                {"properties": {"b": INT}, "required": ["b"]},
            ]
        },
        {"a": 1, "b": 2},
        [{"a": 1}, {"b": 2}],
    ),
    "keywords beside anyOf": (
        {
            "properties": {"a": INT, "b": INT, "c": INT},
            "required": ["a"],
            "anyOf": [{"required": ["b"]}, {"required": ["c"]}],
        },
        {"a": 1, "c": 2},
        [{"a": 1}, {"b": 1}],
    ),
    "what is unevaluated sees branches": (
        {"properties": {"a": INT}, "anyOf": [{"properties": {"b": INT}}], "unevaluatedProperties": False},
        {"a": 1, "b": 2},
        [{"c": 1}],
    ),
    "what is unevaluated sees parts": (
        {"allOf": [{"properties": {"a": INT}}, {"properties": {"b": INT}}], "unevaluatedProperties": False},
        {"a": 1, "b": 2},
        [{"c": 1}],
    ),
    "a closed part that names all": (
        {"allOf": [{"properties": {"a": INT}}, {"properties": {"a": {}}, "unevaluatedProperties": False}]},
        {"a": 1},
        [{"a": "x"}, {"c": 1}],
    ),
    "items of parts": ({"allOf": [{"items": INT}, {"items": {"minimum": 5}}]}, [6], [[4]]),
    "a type beside anyOf": (
        {"type": "string", "anyOf": [{"minLength": 3}, INT, {"const": "x"}]},
        "x",
        ["yy", 1],
    ),
    "keywords beside a reference": ({"$defs": {"a": INT}, "$ref": "#/$defs/a", "minimum": 5}, 5, [3]),
    "references": (
        {
            "$defs": {"a/b": INT},
            "properties": {"q": {"$ref": "#/$defs/a~1b"}, "r": {"$ref": "#/properties/q"}},
        },
        {"q": 1, "r": 2},
        [{"q": "x"}, {"r": "x"}],
    ),
    "recursion": (
        {"properties": {"v": INT, "c": {"type": "array", "items": {"$ref": "#"}}}, "required": ["v"]},
        {"v": 1, "c": [{"v": 2, "c": []}]},
        [{"v": 1, "c": [{}]}],
    ),
    "types of branches": ({"oneOf": [{"type": "string"}, {"type": ["null", "integer"]}]}, 5, [1.5]),
    "a discriminator": (
        {
            "$defs": {
                "A": {
                    "type": "object",
                    "properties": {"k": {"const": "a"}, "v": INT},
                    "required": ["k", "v"],
                },
                "B": {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]},
            },
            "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}, {"type": "null"}],
        },
        {"k": "c"},
        [{"k": "a"}, {}],
    ),
    "enum and type": ({"type": ["integer", "boolean"], "enum": ["a", 1, True]}, True, ["a", 2]),
    "const": ({"const": {"a": [1]}}, {"a": [1]}, [{"a": [2]}]),
    "a tuple": (
        {"prefixItems": [INT, STRING], "minItems": 2, "maxItems": 2},
        [1, "a"],
        [[1], ["a", 1], [1, "a", 2]],
    ),
    "a long tuple": ({"prefixItems": [INT, STRING], "maxItems": 1}, [1], [["a"], [1, "a"]]),
    "an open tuple": ({"prefixItems": [INT], "items": STRING, "maxItems": 3}, [1, "a"], [[1, 2]]),
    "unevaluatedItems": ({"prefixItems": [INT], "unevaluatedItems": False}, [1], [[1, 2]]),
    "items": ({"type": "array", "minItems": 2}, [1, "a", {}], [[1]]),
    "no items": ({"type": "array", "items": False}, [], [[1]]),
    "a map": (
        {"additionalProperties": INT, "propertyNames": {"enum": ["x", "y"]}},
        {"x": 1},
        [{"x": "a"}, {"z": 1}],
    ),
    "pattern properties": (
        {"patternProperties": {"^a[a-z]*$": INT}, "properties": {"b": STRING}},
        {"b": "s", "ab": 1},
        [{"ab": "x"}],
    ),
    "unevaluatedProperties": (
        {"allOf": [{"properties": {"a": INT}}], "properties": {"b": INT}, "unevaluatedProperties": False},
        {"b": 2, "a": 1},
        [{"c": 1}],
    ),
    "further properties": (
        {"properties": {"a": INT}, "additionalProperties": STRING},
        {"a": 1, "b": "x"},
        [{"a": 1, "b": 2}],
    ),
    "numbers of properties": (
        {"properties": {"a": INT, "b": INT, "c": INT}, "minProperties": 2},
        {"a": 1, "c": 1},
        [{"a": 1}],
    ),
    "a forbidden property": ({"properties": {"a": False, "b": INT}}, {"b": 1}, [{"a": 1}]),
}
# Draft 4's, which is another language.
NOT_2020 = {"draft 4's bounds"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_answer_could_break_is_refused_by_name(name: str) -> None:
    schema, part, place = REFUSED[name]
    with pytest.raises(RequestError) as error:
        served(schema)
    message = f"{error.value.info.message} "
    assert part in message
    assert f"{place} " in message or f"{place}:" in message


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_accepts_only_what_fits(name: str) -> None:
    schema, good, bad = SERVED[name]
    answer = compiler().handle(schema_of(schema))
    assert isinstance(answer, Compiled), answer
    grammar = unpack(answer.data, vocabulary().tokenizer_info())

    def accepts(value: Any) -> bool:
        for separators in ((",", ":"), (", ", ": ")):  # values of enum and const have one form
            matcher = load_binding().GrammarMatcher(grammar, None, False, -1, None)
            text = json.dumps(value, ensure_ascii=False, separators=separators)
            if matcher.accept_string(text, False) and matcher.is_completed():
                return True
        return False

    assert accepts(good)
    if name not in NOT_2020:
        formats = jsonschema.FormatChecker(["date", "ipv4"])
        jsonschema.validate(good, schema, jsonschema.Draft202012Validator, format_checker=formats)
    assert not any(accepts(value) for value in bad)


def test_strings_have_no_control_characters() -> None:
    for schema in (STRING, {"type": "string", "maxLength": 3}, {"type": "string", "pattern": "^[^a]*$"}):
        answer = compiler().handle(schema_of(schema))
        assert isinstance(answer, Compiled)
        grammar = unpack(answer.data, vocabulary().tokenizer_info())
        for char in map(chr, range(32)):
            matcher = load_binding().GrammarMatcher(grammar, None, False, -1, None)
            assert not matcher.accept_string(f'"{char}"', False), (schema, char)


def test_a_model_cannot_write_blanks_for_ever() -> None:
    answer = compiler().handle(schema_of({"properties": {"a": INT}, "required": ["a"]}))
    assert isinstance(answer, Compiled)
    matcher = load_binding().GrammarMatcher(
        unpack(answer.data, vocabulary().tokenizer_info()), None, False, -1, None
    )
    assert matcher.accept_string('{\n      "a": ', False)
    assert not matcher.accept_string(" " * 8, False)


def test_equal_bounded_strings_are_compiled_once() -> None:
    """Twenty had 3.7 MB and took 4 s."""
    names = [f"p{number}" for number in range(20)]
    bounded = {"type": "string", "maxLength": 50}
    sizes = []
    for count in (1, 20):
        source = {"properties": dict.fromkeys(names[:count], bounded), "required": names[:count]}
        answer = compiler().handle(schema_of(source))
        assert isinstance(answer, Compiled)
        sizes.append(len(answer.data))
    assert sizes[1] < 4 * sizes[0]
