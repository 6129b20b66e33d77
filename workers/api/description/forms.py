"""What request fields may hold beyond their types.

`FORMS` replaces a field's schema, by the struct that has it, as an endpoint's own `forms` do. `LIMITS`
narrows it, by the field's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from pipeline.wire.limits import MAX_TOOLS
from pipeline.wire.prompts import ROLES, SAME_ROLES, TEMPLATE_OPTIONS
from pipeline.wire.sampling import (
    BIASES,
    MAX_ALLOWED,
    MAX_BANS,
    MAX_CHOICES,
    MAX_GRAMMAR_CHOICES,
    MAX_INT32,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RANGES,
)
from workers.api import anthropic_request, chat_request, responses_request
from workers.api.chat_request import ChatCompletionRequest, RequestMessage
from workers.api.description.contents import (
    ALLOWED,
    EFFORTS,
    FUNCTION,
    JSON_SCHEMA,
    MODE,
    NAMED,
    OUTPUT,
    RESPONSE_FORMATS,
    RESPONSE_NAMED,
    RESPONSE_TOOL,
    SCHEMA,
    STRUCTURE,
    TEMPLATE_OPTION,
    TEXT_FORMATS,
    THINKING,
)
from workers.api.description.schemas import (
    FALSY,
    NAME,
    NULL,
    OBJECT,
    TEXT,
    TOKEN_ID,
    UNSET,
    Json,
    any_of,
    listed,
    one_of,
    opened,
    ref,
)
from workers.api.structure_fields import StructureFields


def _unserved(neutral: Mapping[str, Iterable[object]], empty: Iterable[object]) -> dict[str, Json]:
    """Of fields that are known and take only values that change nothing."""
    return {name: one_of([*empty, *values]) for name, values in neutral.items()}


TEMPLATE_KWARGS = any_of(
    {**opened({}, dict.fromkeys(TEMPLATE_OPTIONS, TEMPLATE_OPTION)), "additionalProperties": False}, NULL
)

FORMS: Mapping[type[msgspec.Struct], Mapping[str, Json]] = {
    StructureFields: {
        "response_format": any_of(RESPONSE_FORMATS, NULL),
        "structured_outputs": any_of(opened({}, STRUCTURE), NULL),
        "guided_json": any_of(SCHEMA, TEXT, NULL),
    },
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
        "chat_template_kwargs": TEMPLATE_KWARGS,
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
    responses_request.ResponsesRequest: {
        "input": any_of(TEXT, listed(ref("Item"))),
        "tools": any_of(listed(RESPONSE_TOOL), NULL),
        "tool_choice": any_of(
            one_of([None, "auto", "none", "required"]),
            NAMED,
            RESPONSE_NAMED,
            opened({"type": one_of(["allowed_tools"]), "tools": listed(RESPONSE_NAMED)}, {"mode": MODE}),
        ),
        "text": any_of(opened({}, {"format": any_of(TEXT_FORMATS, NULL)}), NULL),
        "reasoning": any_of(opened({}, {"effort": EFFORTS}), NULL),
        "chat_template_kwargs": TEMPLATE_KWARGS,
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
        "output_config": any_of({**OUTPUT, "additionalProperties": UNSET}, NULL),
        "output_format": any_of(JSON_SCHEMA, NULL),
        "chat_template_kwargs": TEMPLATE_KWARGS,
    },
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
    "guided_regex": {"minLength": 1},
    "guided_grammar": {"minLength": 1},
    "guided_choice": {"minItems": 1, "maxItems": MAX_GRAMMAR_CHOICES, "items": NAME},
}
# To which types of JSON a keyword of `LIMITS` speaks.
SPOKEN_TO: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("minimum", "maximum", "not"), ("integer", "number")),
    **dict.fromkeys(("minLength", "maxLength"), ("string",)),
    **dict.fromkeys(("minItems", "maxItems", "items"), ("array",)),
    **dict.fromkeys(("maxProperties", "propertyNames", "additionalProperties"), ("object",)),
}
