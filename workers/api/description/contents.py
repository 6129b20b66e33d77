"""JSON schemas of what the structs leave open: parts of messages, items, blocks, tools and structures.

Their own files read these objects. The names here come from the tables there.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.wire.prompts import MAX_TEMPLATE_OPTION
from pipeline.wire.sampling import MAX_GRAMMAR_CHOICES
from workers.api import anthropic_request, chat_request, parts, responses_request
from workers.api.description.schemas import (
    FALSY,
    NAME,
    NULL,
    OBJECT,
    SETTINGS,
    SHARED,
    TEXT,
    UNSET,
    Json,
    any_of,
    closed,
    listed,
    one_of,
    opened,
    optional,
    ref,
    untyped,
)

# Parts of a chat's messages: workers/api/parts.py.


def _media_parts(name: str, kinds: Mapping[str, tuple[str, ...]], settings: Mapping[str, str]) -> list[Json]:
    """A part for each type, and for each key that may hold its URL."""
    SHARED[f"{name}Url"] = _urls(settings)
    url = ref(f"{name}Url")
    details = any_of(*({"pattern": _any_case(one)} for one in ("low", *parts.FULL_DETAILS)))
    SHARED["Detail"] = optional({"type": "string", **details})
    if settings is parts.VIDEO_SETTINGS:
        settings = {**settings, **parts.RATES_OF_FRAMES}
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
                found.append(untyped(closed(given, beside, parts.LABELS)))
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
    untyped(closed({"text": NAME}, {}, parts.LABELS)),
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
TEMPLATE_OPTION: Json = {
    "type": ["boolean", "number", "string", "null"],
    "maxLength": MAX_TEMPLATE_OPTION,
}
CHOICES = listed(NAME, minItems=1, maxItems=MAX_GRAMMAR_CHOICES)
STRUCTURES = any_of(
    opened({"format": OBJECT}), opened({"structures": listed(opened({"begin": {}, "end": {}}))})
)
SCHEMA: Json = {"type": ["object", "boolean"]}
NO_STRUCTURE = one_of([None, False, 0])
STRUCTURE = {
    "json": any_of(SCHEMA, TEXT, NO_STRUCTURE),
    **{name: any_of(NAME, NO_STRUCTURE) for name in ("regex", "grammar")},
    "choice": any_of(CHOICES, NO_STRUCTURE),
    "structural_tag": any_of(STRUCTURES, TEXT, NO_STRUCTURE),
}
RESPONSE_FORMATS = any_of(
    opened({"type": one_of(["text", "json_object"])}),
    opened({"type": one_of(["json_schema"]), "json_schema": opened({"schema": SCHEMA})}),
    {"allOf": [opened({"type": one_of(["structural_tag"])}), STRUCTURES]},
)

# Items of a response: responses_request.py.

SHARED["ResponsePart"] = any_of(
    closed({"type": one_of(["input_text", "output_text"]), "text": TEXT}, {}, responses_request.IGNORED),
    opened({"type": one_of(["refusal"]), "refusal": TEXT}),
    ref("ChatPart"),
)
RESPONSE_CONTENT = any_of(TEXT, listed(ref("ResponsePart")))
THOUGHTS = optional(listed(opened({}, {"text": optional(TEXT)})))


def _item(fields: Mapping[str, Json]) -> Json:
    return closed(fields, {}, responses_request.IGNORED)


_MESSAGE = {"role": one_of(responses_request.ROLES), "content": RESPONSE_CONTENT}
SHARED["Item"] = any_of(
    _item({"type": one_of(["message"]), **_MESSAGE}),
    untyped(_item(_MESSAGE)),
    _item({"type": one_of(["function_call"]), "call_id": TEXT, "name": TEXT, "arguments": TEXT}),
    _item({"type": one_of(["function_call_output"]), "call_id": TEXT, "output": RESPONSE_CONTENT}),
    opened({"type": one_of(["reasoning"])}, {"content": THOUGHTS, "summary": THOUGHTS}),
)
RESPONSE_TOOL = opened({"type": one_of(["function"])})
RESPONSE_TOOL = any_of(
    {"allOf": [RESPONSE_TOOL, opened({"name": NAME}, {"parameters": any_of(OBJECT, NULL)})]},
    {"allOf": [RESPONSE_TOOL, opened({"function": FUNCTION})]},
)
RESPONSE_NAMED = opened({"type": one_of(["function"]), "name": NAME})
TEXT_FORMATS = any_of(
    opened({"type": one_of(["text", "json_object"])}),
    opened({"type": one_of(["json_schema"]), "schema": SCHEMA}),
    {"allOf": [opened({"type": one_of(["structural_tag"])}), STRUCTURES]},
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
JSON_SCHEMA = opened({"type": one_of(["json_schema"]), "schema": SCHEMA})

OUTPUT = opened({}, {"effort": EFFORTS, "format": any_of(JSON_SCHEMA, one_of(FALSY))})
