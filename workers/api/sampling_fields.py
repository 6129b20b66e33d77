"""Fields of a request that say how tokens are chosen, and what they become.

How many tokens, and which log-probabilities, endpoints call by names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.sampling import MAX_LOGIT_BIASES, SamplingParams
from workers.api.request_fields import RequestFields

MAX_CHOICES = 16


class SamplingFields(RequestFields, kw_only=True, forbid_unknown_fields=True):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None


def to_sampling(
    request: SamplingFields,
    defaults: Mapping[str, float],
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The request's sampling; what it leaves open is the model's own default.

    Raises RequestError out of range.
    """

    def pick(name: str, fallback: float) -> float:
        value = getattr(request, name)
        return defaults.get(name, fallback) if value is None else value

    for field in ("logit_bias", "stop_token_ids"):
        if len(getattr(request, field) or ()) > MAX_LOGIT_BIASES:
            raise RequestError(f"{field} has more than {MAX_LOGIT_BIASES} entries", field=field)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return SamplingParams(
        temperature=pick("temperature", 1.0), top_p=pick("top_p", 1.0), top_k=int(pick("top_k", 0)),
        min_p=pick("min_p", 0.0),
        presence_penalty=request.presence_penalty or 0.0, frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=pick("repetition_penalty", 1.0),
        logit_bias=_to_logit_bias(request.logit_bias or {}), seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0, ignore_eos=request.ignore_eos, stop=stop,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=logprobs,
    )  # fmt: skip


def _to_logit_bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError(
            "logit_bias maps token ids, written as strings, to numbers", field="logit_bias"
        ) from None


def check_max_tokens(limit: int | None, field: str) -> None:
    """Raises RequestError, naming the field, out of range."""
    if limit is not None and not 1 <= limit < 2**31:
        raise RequestError(f"{field} must be at least 1 and fit 32 bits, got {shown(limit)}", field=field)


def num_choices(n: int | None) -> int:
    """How many answers are asked for. Raises RequestError for too many, or none."""
    count = 1 if n is None else n
    if not 1 <= count <= MAX_CHOICES:
        raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {count}", field="n")
    return count
