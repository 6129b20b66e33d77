"""The fields by which a request says what form its output has: OpenAI's, and vLLM's old and new ones."""

from __future__ import annotations

import json
from typing import Any

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.sampling import Grammar, GrammarKind
from workers.api.request_fields import RequestFields

Json = dict[str, Any]
# The keys of `structured_outputs`, and the fields before them.
KINDS = {
    "json": GrammarKind.JSON_SCHEMA,
    "json_object": GrammarKind.JSON_OBJECT,
    "regex": GrammarKind.REGEX,
    "choice": GrammarKind.CHOICE,
    "grammar": GrammarKind.EBNF,
    "structural_tag": GrammarKind.STRUCTURAL_TAG,
}
GUIDED = ("json", "regex", "choice", "grammar")


class StructureFields(RequestFields, kw_only=True):
    response_format: Json | None = None
    structured_outputs: Json | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def to_grammar(request: StructureFields) -> Grammar | None:
    """What the output must follow. Raises RequestError, naming the field, for no such form, or for two."""
    found: dict[str, Grammar] = {}
    if request.response_format is not None and (grammar := _of_response_format(request.response_format)):
        found["response_format"] = grammar
    for key, value in (request.structured_outputs or {}).items():
        if key in KINDS and value not in (None, False):
            field = f"structured_outputs.{key}"
            found[field] = _grammar(KINDS[key], value, field)
    for key in GUIDED:
        field = f"guided_{key}"
        if (value := getattr(request, field)) is not None:
            found[field] = _grammar(KINDS[key], value, field)
    if len(found) > 1:
        first, second = list(found)[:2]
        what = f"only one of {first} and {second} can say what form the output has"
        raise RequestError(what, field=second)
    return next(iter(found.values()), None)


def _of_response_format(given: Json) -> Grammar | None:
    match kind := given.get("type"):
        case "text":
            return None
        case "json_object":
            return Grammar(GrammarKind.JSON_OBJECT, field="response_format")
        case "json_schema":
            named = given.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            field = "response_format.json_schema"
            if not isinstance(schema, dict | bool):
                raise RequestError(f"{field} must be an object with a schema", field=field)
            return _grammar(GrammarKind.JSON_SCHEMA, schema, f"{field}.schema")
        case "structural_tag":
            return _grammar(GrammarKind.STRUCTURAL_TAG, given, "response_format")
        case _:
            known = "text, json_object, json_schema, structural_tag"
            what = f"response_format.type must be one of {known}, got {shown(kind)}"
            raise RequestError(what, field="response_format.type")


def _grammar(kind: GrammarKind, value: object, field: str) -> Grammar:
    match kind:
        case GrammarKind.JSON_OBJECT:
            return Grammar(kind, field=field)
        case GrammarKind.JSON_SCHEMA | GrammarKind.STRUCTURAL_TAG:
            parsed = _parsed(value, field)
            if kind is GrammarKind.STRUCTURAL_TAG:
                parsed = _structural_tag(parsed, field)
            return Grammar(kind, json.dumps(parsed, ensure_ascii=False), field)
        case GrammarKind.CHOICE:
            if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
                raise RequestError(f"{field} must be a list of texts, got {shown(value)}", field=field)
            return Grammar(kind, json.dumps(value, ensure_ascii=False), field)
        case GrammarKind.REGEX | GrammarKind.EBNF:
            if not isinstance(value, str) or not value:
                raise RequestError(f"{field} must be a text, got {shown(value)}", field=field)
            return Grammar(kind, value, field)


def _parsed(value: object, field: str) -> object:
    """Of an object, or of its JSON in a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f"{field} is not valid JSON", field=field) from None
    if not isinstance(value, dict | bool):
        raise RequestError(f"{field} must be an object, got {shown(value)}", field=field)
    return value


def _structural_tag(given: object, field: str) -> Json:
    """In xgrammar's present form. The one before has a list of structures, and their triggers."""
    if isinstance(given, dict) and isinstance(given.get("format"), dict):
        return {"type": "structural_tag", "format": given["format"]}
    structures = given.get("structures") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(structures, list):
        raise RequestError(f"{field} must have a format, or structures and triggers", field=field)
    tags = []
    for one in structures:
        if not isinstance(one, dict) or not {"begin", "end"} <= one.keys():
            raise RequestError(f"a structure has begin, schema and end, got {shown(one)}", field=field)
        content = {"type": "json_schema", "json_schema": one.get("schema", True)}
        tags.append({"type": "tag", "begin": one["begin"], "content": content, "end": one["end"]})
    triggered = {"type": "triggered_tags", "triggers": given.get("triggers") or [], "tags": tags}
    return {"type": "structural_tag", "format": triggered}
