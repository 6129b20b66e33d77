"""The sampling fields of a request, and their conversion to `SamplingParams`.

They are derived from `SamplingParams`: a parameter added there is a field of every endpoint. Only for the
number of tokens, log-probabilities and grammars endpoints have names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.sampling import MAX_LOGIT_BIASES, SamplingParams
from workers.api.request_fields import RequestFields

NAMED_BY_ENDPOINTS = ("max_tokens", "logprobs", "grammar")


class _WrittenFields(RequestFields, kw_only=True, forbid_unknown_fields=True):
    """Parameters whose type in JSON differs from the wire's."""

    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None


def _taken_over() -> list[tuple[str, Any, None]]:
    """All other parameters, with their name and type on the wire."""
    known = (*_WrittenFields.__struct_fields__, *NAMED_BY_ENDPOINTS)
    fields = msgspec.structs.fields(SamplingParams)
    return [(field.name, field.type | None, None) for field in fields if field.name not in known]


if TYPE_CHECKING:
    SamplingFields = _WrittenFields
else:
    SamplingFields = msgspec.defstruct(
        "SamplingFields", _taken_over(), bases=(_WrittenFields,), kw_only=True, forbid_unknown_fields=True
    )


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
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    values: dict[str, Any] = {name: getattr(request, name) for name in names}
    values |= {
        "logit_bias": _to_logit_bias(request.logit_bias or {}),
        "stop": tuple(stop or ()),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "max_tokens": max_tokens,
        "logprobs": logprobs,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return SamplingParams(**{**defaults, **given})


def _to_logit_bias(given: dict[str, float]) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIASES:  # before all are converted
        raise RequestError(f"logit_bias has more than {MAX_LOGIT_BIASES} entries", field="logit_bias")
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError(
            "logit_bias maps token ids, written as strings, to numbers", field="logit_bias"
        ) from None


def check_max_tokens(limit: int | None, field: str) -> None:
    """Raises RequestError, naming the field, for a limit out of range."""
    if limit is not None and not 1 <= limit < 2**31:
        raise RequestError(f"{field} must be at least 1 and fit 32 bits, got {shown(limit)}", field=field)
