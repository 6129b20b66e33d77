"""How to choose tokens and when to stop."""

from __future__ import annotations

import enum
import math

import msgspec

from pipeline.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, or a stop string found by the client library
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # the client or its connection went away


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling of one request. `temperature` 0 is greedy; `top_k` 0 or -1 means no limit; `max_tokens` None: all the context.

    Raises RequestError, naming the field, when a value is out of range or not finite.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None  # the client library draws one where none was given, so that a resubmission repeats it
    max_tokens: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", self.temperature, "between 0 and 100")
        _check(math.isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(-1 <= self.top_k < 2**31, "top_k", self.top_k, "-1 (no limit) or more")
        _check(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        _check(self.max_tokens is None or 1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1")
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            _check(0 < len(text) <= MAX_STOP_LENGTH, "stop", f"a string of {len(text)} characters", f"1 to {MAX_STOP_LENGTH} characters each")


def _check(holds: bool, field: str, value: object, limit: str) -> None:
    if not holds:
        raise RequestError(f"{field} must be {limit}, got {value}", field=field)
