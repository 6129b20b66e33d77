"""Grammars compiled in the test's own process, and random JSON schemas."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.wire.sampling import Grammar, GrammarKind
from workers.grammars.vocabulary import GrammarVocabulary
from workers.preprocess.grammar_process import Compiled, Compiler

MODEL = EMBEDDED / "model"


@functools.cache
def vocabulary() -> GrammarVocabulary:
    """The embedded model's."""
    info = read_model_info(MODEL)
    return GrammarVocabulary(MODEL, info.text.vocab_size, info.eos_token_ids)


@functools.cache
def compiler() -> Compiler:
    return Compiler(vocabulary(), 2048)


def grammar_of(kind: GrammarKind, source: Any = "") -> Grammar:
    return Grammar(kind, source if isinstance(source, str) else json.dumps(source))


def schema_of(source: Any) -> Grammar:
    return grammar_of(GrammarKind.JSON_SCHEMA, json.dumps(source))


def compiled(grammar: Grammar) -> bytes:
    answer = compiler().handle(grammar)
    assert isinstance(answer, Compiled), answer
    return answer.data


class RandomSchemas:
    """Schemas for which every answer can end: what may grow has a bound, recursion included."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def document(self) -> dict[str, Any]:
        definitions = {f"d{number}": self.schema(2) for number in range(2)}
        return {**self.schema(3, ["d0", "d1"]), "$defs": definitions, "title": "drawn"}

    def schema(self, depth: int, names: list[str] | None = None) -> dict[str, Any]:
        names = names or []
        leaves = [
            "string",
            "pattern",
            "format",
            "integer",
            "number",
            "multiple",
            "enum",
            "const",
            "boolean",
            "null",
        ]
        nodes = ["object", "object", "array", "tuple", "anyOf", "oneOf", "allOf", "map", "types"]
        kinds = leaves + (nodes * 2 if depth else []) + (["ref"] * 3 if names and depth < 3 else [])
        kind = self._rng.choice(kinds)
        drawn: dict[str, Any] = getattr(self, f"_{kind.lower()}")(depth, names)
        return drawn | ({"description": "any"} if self._rng.random() < 0.3 else {})

    def _string(self, depth: int, names: list[str]) -> dict[str, Any]:
        least = self._rng.choice([0, 0, 2])
        return {"type": "string", "minLength": least, "maxLength": least + self._rng.randrange(6)}

    def _pattern(self, depth: int, names: list[str]) -> dict[str, Any]:
        patterns = (
            r"^[a-z]{1,5}$",
            r"^\d{2}-[A-F]+x$",
            "^(ab|c)?d$",
            r"^[\w.]{0,4}$",
            "red|green",
            "^[^a-y]{2}$",
        )
        return {"type": "string", "pattern": self._rng.choice(patterns)}

    def _format(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"type": "string", "format": self._rng.choice(["date", "time", "date-time", "uuid", "ipv4"])}

    def _integer(self, depth: int, names: list[str]) -> dict[str, Any]:
        low = self._rng.randrange(-200, 200)
        return self._rng.choice(
            [
                {"type": "integer", "minimum": low, "maximum": low + self._rng.randrange(300)},
                {"minimum": low, "type": "integer"},
                {"type": "integer", "exclusiveMaximum": low},
                {"type": "integer"},
            ]
        )

    def _number(self, depth: int, names: list[str]) -> dict[str, Any]:
        low = self._rng.randrange(-2000, 2000) / 8
        return self._rng.choice(
            [
                {"type": "number", "minimum": low, "maximum": low + self._rng.randrange(1, 300) / 4},
                {"type": "number", "exclusiveMinimum": low},
                {"type": "number"},
            ]
        )

    def _multiple(self, depth: int, names: list[str]) -> dict[str, Any]:
        step = self._rng.randrange(2, 30)
        return {"type": "integer", "multipleOf": step} | self._rng.choice([{}, {"minimum": 0, "maximum": 99}])

    def _enum(self, depth: int, names: list[str]) -> dict[str, Any]:
        values = ["a", 'b"\\', "Ä€\n", 1, 2.5, -3, None, True, {"k": [1, "x"]}, []]
        return {"enum": self._rng.sample(values, self._rng.randrange(1, 5))}

    def _const(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"const": self._rng.choice(["x y", 7, None, {"a": {"b": 1}}, [1, 2]])}

    def _boolean(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"type": "boolean"}

    def _null(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"type": ["null"]}

    def _object(self, depth: int, names: list[str]) -> dict[str, Any]:
        keys = self._rng.sample(["a", "b c", 'd"e', "longer name", "ü"], self._rng.randrange(1, 5))
        properties = {key: self.schema(depth - 1, names) for key in keys}
        drawn: dict[str, Any] = {"type": "object", "properties": properties}
        drawn["required"] = self._rng.sample(keys, self._rng.randrange(len(keys) + 1))
        drawn |= self._rng.choice([{}, {"additionalProperties": False}, {"unevaluatedProperties": False}])
        if self._rng.random() < 0.2:
            drawn["minProperties"] = self._rng.randrange(len(keys) + 1)
        if self._rng.random() < 0.2:
            drawn["maxProperties"] = max(
                len(drawn["required"]), self._rng.randrange(5), drawn.get("minProperties", 0)
            )
        return drawn

    def _map(self, depth: int, names: list[str]) -> dict[str, Any]:
        value = self.schema(depth - 1, names)
        named = {"propertyNames": {"enum": ["p", "q"]}, "additionalProperties": value}
        kinds = ({"additionalProperties": value}, {"patternProperties": {"^[xy]{1,3}$": value}}, named)
        return {"type": "object", "maxProperties": 2, **self._rng.choice(kinds)}

    def _array(self, depth: int, names: list[str]) -> dict[str, Any]:
        least = self._rng.randrange(3)
        bounds = {"minItems": least, "maxItems": least + self._rng.randrange(3)}
        return {"type": "array", "items": self.schema(depth - 1, names), **bounds}

    def _tuple(self, depth: int, names: list[str]) -> dict[str, Any]:
        prefix = [self.schema(depth - 1, names) for _ in range(self._rng.randrange(1, 4))]
        drawn: dict[str, Any] = {"type": "array", "prefixItems": prefix}
        further = {"items": self.schema(0), "maxItems": len(prefix) + 1}
        return drawn | self._rng.choice([{}, {"items": False}, further, {"minItems": len(prefix)}])

    def _anyof(self, depth: int, names: list[str]) -> dict[str, Any]:
        beside = self._rng.choice([{}, {"type": ["string", "integer", "object", "array", "null"]}])
        branches = [self.schema(depth - 1, names), {"type": "null"}, {"const": "word"}]
        return {**beside, "anyOf": branches}

    def _oneof(self, depth: int, names: list[str]) -> dict[str, Any]:
        def tagged(tag: str) -> dict[str, Any]:
            properties = {"tag": {"const": tag}, "value": self.schema(depth - 1, names)}
            return {"type": "object", "properties": properties, "required": ["tag"]}

        return {"oneOf": [tagged("one"), tagged("two"), {"type": "string", "maxLength": 3}]}

    def _allof(self, depth: int, names: list[str]) -> dict[str, Any]:
        one = {"properties": {"m": self.schema(depth - 1, names)}, "required": ["m"]}
        other = {"properties": {"n": self.schema(depth - 1, names), "m": {}}}
        return {"type": "object", "allOf": [one, other]}

    def _types(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"type": ["integer", "string", "null"], "maxLength": 3, "minimum": 5, "maximum": 10}

    def _ref(self, depth: int, names: list[str]) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self._rng.choice(names)}"}
