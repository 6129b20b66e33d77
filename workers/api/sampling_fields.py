"""The sampling fields of a request, and their conversion to `SamplingParams`.

They are derived from `SamplingParams`: a parameter added there is a field of every endpoint. Only for the
number of tokens, log-probabilities and grammars endpoints have names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.sampling import MAX_LOGIT_BIASES, MAX_SEED, SamplingParams
from workers.api.structure_fields import StructureFields, to_grammar

NAMED_BY_ENDPOINTS = (
    "max_tokens", "logprobs", "grammar", "banned_token_ids", "thinking_budget", "thinking_end",
)  # fmt: skip
# Numbers that other servers read as something else than a number.
LEAST_TOP_P = 1e-9  # for 0: the best token only
ANY_SEED = -1
MAX_NAMED = 8  # wrong keys in an error
TOKEN_ID = re.compile("[0-9]{1,10}")  # as a key of `logit_bias`
NO_LIMIT = -1  # of `max_tokens`


class _WrittenFields(StructureFields, kw_only=True):
    """Parameters that are written otherwise in JSON, or that endpoints read."""

    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    n: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None


def _taken_over() -> list[tuple[str, Any, None]]:
    """All other parameters, with their name and type on the wire."""
    known = (*_WrittenFields.__struct_fields__, *NAMED_BY_ENDPOINTS)
    fields = msgspec.structs.fields(SamplingParams)
    return [(field.name, field.type | None, None) for field in fields if field.name not in known]


if TYPE_CHECKING:
    SamplingFields = _WrittenFields
else:
    SamplingFields = msgspec.defstruct("SamplingFields", _taken_over(), bases=(_WrittenFields,), kw_only=True)


def to_sampling(
    request: SamplingFields,
    defaults: Mapping[str, float],
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The request's sampling, with the model's own defaults for missing fields.

    Raises RequestError for a value out of range.
    """
    names = set(SamplingParams.__struct_fields__) & set(request.__struct_fields__)
    # An empty string stops nothing, as at OpenAI.
    stop = ([request.stop] if request.stop else []) if isinstance(request.stop, str) else request.stop
    values: dict[str, Any] = {name: getattr(request, name) for name in names}
    if values.get("top_p") == 0:
        values["top_p"] = LEAST_TOP_P
    if (seed := values.get("seed")) is not None and -MAX_SEED <= seed < 0:
        values["seed"] = None if seed == ANY_SEED else seed + MAX_SEED
    values |= {
        "logit_bias": _to_logit_bias(request.logit_bias or {}),
        "stop": tuple(stop or ()),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "allowed_token_ids": tuple(request.allowed_token_ids) if request.allowed_token_ids else None,
        "bad_words": tuple(filter(None, request.bad_words or ())),
        "max_tokens": None if max_tokens == NO_LIMIT else max_tokens,
        "logprobs": logprobs,
        "grammar": to_grammar(request),
    }
    given = {name: value for name, value in values.items() if value is not None}
    return SamplingParams(**{**defaults, **given})


def _to_logit_bias(given: dict[str, float]) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIASES:  # before all are converted
        raise RequestError(f"logit_bias has more than {MAX_LOGIT_BIASES} entries", field="logit_bias")
    if wrong := [shown(token) for token in given if not TOKEN_ID.fullmatch(token)]:
        named = f"{', '.join(wrong[:MAX_NAMED])} {'is no id' if len(wrong) == 1 else 'are no ids'}"
        what = f"logit_bias maps token ids, written as strings, to numbers; {named}"
        raise RequestError(what, field="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def check_max_tokens(limit: int | None, field: str) -> None:
    """Raises RequestError, naming the field, for a limit out of range."""
    if limit is not None and limit != NO_LIMIT and not 1 <= limit < 2**31:
        raise RequestError(f"{field} must be at least 1 and fit 32 bits, got {shown(limit)}", field=field)
