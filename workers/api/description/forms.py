"""JSON schemas of what request fields may hold beyond their types: ranges, and objects that the structs leave
open because their own files read them (parts, items, blocks, tools). The names come from those files' tables.

`FORMS` replaces a field's schema, by the struct that has it; `LIMITS` narrows it, by the field's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pipeline.wire.limits import MAX_TOOLS
from pipeline.wire.prompts import ROLES, SAME_ROLES, TEMPLATE_OPTIONS
from pipeline.wire.sampling import (
    BIASES,
    MAX_ALLOWED,
    MAX_BANS,
    MAX_CHOICES,
    MAX_INT32,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RANGES,
)
from workers.api import anthropic_request, chat_request, parts, responses_request
from workers.api.chat_request import ChatCompletionRequest, RequestMessage
from workers.api.endpoints.completions import MAX_PROMPTS, CompletionRequest
from workers.api.endpoints.tokenize import DetokenizeRequest
from workers.api.structure_fields import StructureFields

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
NUMBER: Json = {"type": "number", "exclusiveMinimum": -parts.MAX_NUMBER, "exclusiveMaximum": parts.MAX_NUMBER}
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
    """An object whose other keys must be empty, but for those that are ignored. `further` may be empty too."""
    known = {**required, **{name: optional(schema) for name, schema in (further or {}).items()}}
    others: dict[str, Json] = {name: {} for name in sorted(ignored) if name not in known}
    schema = opened({**known, **others})
    return {**schema, "required": list(required), "additionalProperties": UNSET}


# Parts of a chat's messages: workers/api/parts.py.


def _media_parts(name: str, kinds: Mapping[str, tuple[str, ...]], settings: Mapping[str, str]) -> list[Json]:
    """A part for each type, and for each key that may hold its URL."""
    SHARED[f"{name}Url"] = _urls(settings)
    url = ref(f"{name}Url")
    details = any_of(*({"pattern": _any_case(one)} for one in ("low", *parts.FULL_DETAILS)))
    SHARED["Detail"] = optional({"type": "string", **details})
    numbers = {name: SETTINGS[kind] for name, kind in settings.items()}
    beside = {**numbers, "detail": ref("Detail"), "uuid": TEXT}
    SHARED[f"{name}Source"] = any_of(url, closed({"url": url}, beside, parts.LABELS))
    SHARED[f"No{name}"] = any_of(UNSET, closed({"url": UNSET}, beside, parts.LABELS))
    found = []
    for kind, sources in kinds.items():
        for source in sources:
            given = {source: ref(f"{name}Source")}
            found.append(closed({"type": one_of([kind]), **given}, beside, parts.LABELS))
            if source == kind:  # the type may be left out
                found.append(closed(given, {"type": NULL, **beside}, parts.LABELS))
        empty = {source: ref(f"No{name}") for source in sources}
        found.append(closed({"type": one_of([kind]), "uuid": NAME}, {**empty, **beside}, parts.LABELS))
    return found


def _urls(settings: Mapping[str, str]) -> Json:
    is_video = settings is parts.VIDEO_SETTINGS
    return any_of(NAME, listed(NAME, minItems=1)) if is_video else NAME


def _any_case(word: str) -> str:
    return "^" + "".join(f"[{letter}{letter.upper()}]" for letter in word) + "$"


FILE_DATA: Json = {"type": "string", "pattern": "^data:(image|video)/"}
FILE = any_of(*(closed({name: FILE_DATA}, {"type": {}}, parts.LABELS) for name in ("file_data", "file_url")))
CHAT_PART: Json = any_of(
    closed({"type": one_of(parts.TEXTS), "text": TEXT}, {}, parts.LABELS),
    closed({"text": NAME}, {"type": NULL}, parts.LABELS),
    *_media_parts("Picture", parts.IMAGE_SOURCES, parts.IMAGE_SETTINGS),
    *_media_parts("Video", parts.VIDEO_SOURCES, parts.VIDEO_SETTINGS),
    opened({"type": one_of([parts.FILE]), "file": FILE}),
)

SHARED["ChatPart"] = CHAT_PART

# Tools and what the answer must be: tool_choice.py, chat_request.py, structure_fields.py.

FUNCTION = opened({"name": NAME}, {"parameters": any_of(OBJECT, NULL)})
NAMED = opened({"type": one_of(["function"]), "function": opened({"name": NAME})})
MODE = one_of(["auto", "required"])
ALLOWED = opened({"tools": listed(opened({"function": opened({"name": NAME})}))}, {"mode": MODE})
EFFORT = one_of([*chat_request.EFFORTS, None])
EFFORTS = any_of(EFFORT, opened({}, {"effort": EFFORT}))
TEMPLATE_OPTION: Json = {"type": ["boolean", "number", "string", "null"]}
STRUCTURES = any_of(
    opened({"format": OBJECT}), opened({"structures": listed(opened({"begin": {}, "end": {}}))})
)
RESPONSE_FORMATS = any_of(
    opened({"type": one_of(["text", "json_object"])}),
    opened(
        {"type": one_of(["json_schema"]), "json_schema": opened({"schema": {"type": ["object", "boolean"]}})}
    ),
    {"allOf": [opened({"type": one_of(["structural_tag"])}), STRUCTURES]},
)

# Items of a response: responses_request.py.

SHARED["ResponsePart"] = any_of(
    closed({"type": one_of(["input_text", "output_text"]), "text": TEXT}, {}, responses_request.IGNORED),
    opened({"type": one_of(["refusal"]), "refusal": TEXT}),
    ref("ChatPart"),
)
RESPONSE_CONTENT = any_of(TEXT, listed(ref("ResponsePart")))
THOUGHTS = any_of(listed(opened({}, {"text": any_of(TEXT, NULL)})), one_of(FALSY))


def _item(kind: str | None, fields: Mapping[str, Json]) -> Json:
    required = {} if kind is None else {"type": one_of([kind])}
    return closed({**required, **fields}, {"type": UNSET} if kind is None else {}, responses_request.IGNORED)


_MESSAGE = {"role": one_of(responses_request.ROLES), "content": RESPONSE_CONTENT}
SHARED["Item"] = any_of(
    _item("message", _MESSAGE),
    {**_item(None, _MESSAGE), "properties": {**_item(None, _MESSAGE)["properties"], "type": NULL}},
    _item("function_call", {"call_id": TEXT, "name": TEXT, "arguments": TEXT}),
    _item("function_call_output", {"call_id": TEXT, "output": RESPONSE_CONTENT}),
    opened({"type": one_of(["reasoning"])}, {"content": THOUGHTS, "summary": THOUGHTS}),
)
RESPONSE_TOOL = opened({"type": one_of(["function"])})
RESPONSE_TOOL = any_of(
    {"allOf": [RESPONSE_TOOL, opened({"name": NAME}, {"parameters": any_of(OBJECT, NULL)})]},
    {"allOf": [RESPONSE_TOOL, opened({"function": FUNCTION})]},
)

# Anthropic's blocks: anthropic_request.py.


def _block(kind: str, required: Mapping[str, Json], further: Mapping[str, Json] | None = None) -> Json:
    return closed({"type": one_of([kind]), **required}, further, anthropic_request.IGNORED_IN_BLOCK)


SOURCE = any_of(
    opened({"type": one_of(["base64"]), "data": TEXT, "media_type": TEXT}),
    opened({"type": one_of(["url"]), "url": TEXT}),
)
DOCUMENT = any_of(
    opened({"type": one_of(["text"]), "data": TEXT}), opened({"type": one_of(["content"]), "content": TEXT})
)
SHARED["PlainBlock"] = any_of(
    _block("text", {"text": TEXT}),
    _block("image", {"source": SOURCE}),
    _block("document", {"source": DOCUMENT}),
)
SHARED["Block"] = any_of(
    ref("PlainBlock"),
    opened(
        {"type": one_of(["tool_use"]), "id": TEXT, "name": TEXT}, {"input": any_of(OBJECT, one_of(FALSY))}
    ),
    _block(
        "tool_result",
        {"tool_use_id": TEXT},
        {"content": any_of(TEXT, listed(ref("PlainBlock"))), "is_error": {}},
    ),
    opened({"type": one_of(["thinking"]), "thinking": TEXT}),
    opened({"type": one_of(["redacted_thinking"])}),
)
THINKING = opened(
    {"type": one_of(["enabled", "disabled", "adaptive"])}, {"budget_tokens": {"type": ["integer", "null"]}}
)
JSON_SCHEMA = opened({"type": one_of(["json_schema"]), "schema": {"type": ["object", "boolean"]}})


def _unserved(neutral: Mapping[str, Iterable[object]], empty: Iterable[object]) -> dict[str, Json]:
    """Of fields that are known and take only values that change nothing."""
    return {name: one_of([*empty, *values]) for name, values in neutral.items()}


FORMS: Mapping[type[msgspec.Struct], Mapping[str, Json]] = {
    StructureFields: {"response_format": any_of(RESPONSE_FORMATS, NULL)},
    ChatCompletionRequest: {
        "tools": any_of(listed(opened({"function": FUNCTION}, {"type": one_of(["function"])})), NULL),
        "tool_choice": any_of(
            one_of([None, "auto", "none", "required"]),
            NAMED,
            {
                "allOf": [
                    opened({"type": one_of(["allowed_tools"])}),
                    any_of(ALLOWED, opened({"allowed_tools": ALLOWED})),
                ]
            },
        ),
        "chat_template_kwargs": any_of(
            {**opened({}, dict.fromkeys(TEMPLATE_OPTIONS, TEMPLATE_OPTION)), "additionalProperties": False},
            NULL,
        ),
        "reasoning_effort": EFFORTS,
        "reasoning": EFFORTS,
        **_unserved(chat_request.NEUTRAL, (None,)),
    },
    RequestMessage: {
        "role": one_of([*ROLES, *SAME_ROLES]),
        "content": any_of(TEXT, listed(ref("ChatPart")), NULL),
        "refusal": one_of([None, ""]),
        "annotations": one_of([None, []]),
        "audio": one_of(FALSY),
        "function_call": one_of(FALSY),
    },
    CompletionRequest: {
        "prompt": any_of(
            TEXT,
            listed(TOKEN_ID, minItems=1),
            listed(any_of(TEXT, listed(TOKEN_ID)), minItems=1, maxItems=MAX_PROMPTS),
        ),
        "max_tokens": {"type": ["integer", "null"], "minimum": -1, "maximum": MAX_INT32 - 1},
    },
    responses_request.ResponsesRequest: {
        "input": any_of(TEXT, listed(ref("Item"))),
        "tools": any_of(listed(RESPONSE_TOOL), NULL),
        "n": one_of([None, 1]),
        **_unserved(
            {**responses_request.NEUTRAL, "max_tool_calls": (), "truncation": ("disabled", "")}, (None,)
        ),
    },
    anthropic_request.AnthropicMessage: {
        "role": one_of(["user", "assistant", "system"]),
        "content": any_of(TEXT, listed(ref("Block"))),
    },
    anthropic_request.MessagesFields: {
        "system": any_of(TEXT, listed(ref("PlainBlock")), NULL),
        "tools": any_of(
            listed(
                opened(
                    {"name": NAME},
                    {"type": one_of([None, "custom"]), "input_schema": any_of(OBJECT, one_of(FALSY))},
                )
            ),
            NULL,
        ),
        "tool_choice": any_of(
            opened({"type": one_of(["auto", "any", "none"])}),
            opened({"type": one_of(["tool"]), "name": NAME}),
            NULL,
        ),
        "thinking": any_of(THINKING, NULL),
        "output_config": any_of(closed({}, {"effort": EFFORTS, "format": JSON_SCHEMA}), NULL),
        "output_format": any_of(JSON_SCHEMA, NULL, one_of([{}])),
    },
    DetokenizeRequest: {"tokens": listed(TOKEN_ID)},
}

BUDGET = {"minimum": 0, "maximum": MAX_INT32 - 1}
STRINGS = {"items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}}
MAX_TOKENS = {"minimum": -1, "maximum": MAX_INT32 - 1, "not": one_of([0])}
LIMITS: Mapping[str, Json] = {
    **{name: {"minimum": one.least, "maximum": one.most} for name, one in RANGES.items()},
    "seed": {"minimum": -MAX_SEED, "maximum": MAX_SEED - 1},
    "priority": {"minimum": -MAX_INT32, "maximum": MAX_INT32 - 1},
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), MAX_TOKENS),
    **dict.fromkeys(("thinking_token_budget", "thinking_budget"), BUDGET),
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "best_of": {"minimum": 1, "maximum": MAX_CHOICES},
    "stop": {"maxLength": MAX_STOP_LENGTH, "maxItems": MAX_STOP_STRINGS, **STRINGS},
    "stop_sequences": {"maxItems": MAX_STOP_STRINGS, **STRINGS},
    "bad_words": {"maxItems": MAX_BANS, "items": {"type": "string", "maxLength": MAX_STOP_LENGTH}},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS, "items": TOKEN_ID},
    "allowed_token_ids": {"maxItems": MAX_ALLOWED, "items": TOKEN_ID},
    "logit_bias": {
        "maxProperties": MAX_LOGIT_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": BIASES.least, "maximum": BIASES.most},
    },
    "tools": {"maxItems": MAX_TOOLS},
}
# To which types of JSON a keyword of `LIMITS` speaks.
SPOKEN_TO: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("minimum", "maximum", "not"), ("integer", "number")),
    "maxLength": ("string",),
    **dict.fromkeys(("maxItems", "items"), ("array",)),
    **dict.fromkeys(("maxProperties", "propertyNames", "additionalProperties"), ("object",)),
}
