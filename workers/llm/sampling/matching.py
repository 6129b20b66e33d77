"""Rules that need tokens on the host, such as grammars: each request with a rule has a matcher.

    start(params, tokens) → allowed() → the token is chosen → accept(token_ids) → allowed() → …

Only rank 0 has matchers. The forward of step n + 1 starts with the tokens of step n on the device. Meanwhile
matchers accept these tokens on the host, and make the masks of the next ones. Only the choice for rows with a
matcher waits for masks (`ModelRunner.choose`). Other ranks get them in a message behind the plan
(`TokenMasks`). No torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.tokens import TokensSoFar

Mask = npt.NDArray[np.uint8]  # [vocab / 8]: one bit per token, the lowest first; set: allowed


class TokenVocabulary(NamedTuple):
    size: int
    eos_token_ids: Sequence[int]


class Matcher(Protocol):
    """Follows the output of one request."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes the next output tokens. Not called with the tokens that end the request."""
        ...

    def allowed(self) -> Mask:
        """The tokens that may come next; at least one."""
        ...


class HostRule(Protocol):
    def __init__(self, vocabulary: TokenVocabulary) -> None: ...

    def start(self, params: SamplingParams, tokens: TokensSoFar) -> Matcher | None:
        """For a request with these tokens, earlier attempts included; None if it does not use the rule."""
        ...


# A new rule has a line here, and a field of `SamplingParams` that asks for it.
HOST_RULES: tuple[type[HostRule], ...] = ()


def make_host_rules(vocabulary: TokenVocabulary) -> tuple[HostRule, ...]:
    return tuple(kind(vocabulary) for kind in HOST_RULES)


def start_matchers(
    rules: Sequence[HostRule], params: SamplingParams, tokens: TokensSoFar
) -> tuple[Matcher, ...]:
    started = (rule.start(params, tokens) for rule in rules)
    return tuple(matcher for matcher in started if matcher is not None)


def mask_of(matchers: Sequence[Matcher]) -> bytes:
    """The tokens that all of them allow."""
    mask: Mask = functools.reduce(np.bitwise_and, [matcher.allowed() for matcher in matchers])
    return mask.tobytes()
