"""Rules that need the tokens on the host: a matcher is a data structure of the host, one for each request.

    start(params, tokens) → allowed() → the token is chosen → accept(token_ids) → allowed() → …

Rank 0 alone has matchers. The forward of step n + 1 starts with the tokens of step n on the device.
Meanwhile matchers accept these tokens, which have arrived on the host, and say which ones may come next. Only
the choice of the rows that have a matcher waits for that (`ModelRunner.choose`). The other ranks get the
masks in a message behind the plan (`TokenMasks`). No torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.tokens import Tokens

Mask = npt.NDArray[np.uint8]  # [bytes of a vocabulary]: a bit a token, the lowest one first; set: it may come


class Vocabulary(NamedTuple):
    size: int
    eos_token_ids: Sequence[int]


class Matcher(Protocol):
    """Follows the output of one request."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """These come behind what it has seen. Not called with the tokens that end the request."""
        ...

    def allowed(self) -> Mask:
        """Which tokens may come next; at least one."""
        ...


class HostRule(Protocol):
    def __init__(self, vocabulary: Vocabulary) -> None: ...

    def start(self, params: SamplingParams, tokens: Tokens) -> Matcher | None:
        """For a request that has these tokens, of earlier attempts too; None: it asks nothing of the rule."""
        ...


# All there are. One that is added needs nothing but its line here.
HOST_RULES: tuple[type[HostRule], ...] = ()


def make_host_rules(vocabulary: Vocabulary) -> tuple[HostRule, ...]:
    return tuple(kind(vocabulary) for kind in HOST_RULES)


def start_matchers(rules: Sequence[HostRule], params: SamplingParams, tokens: Tokens) -> tuple[Matcher, ...]:
    started = (rule.start(params, tokens) for rule in rules)
    return tuple(matcher for matcher in started if matcher is not None)


def mask_of(matchers: Sequence[Matcher]) -> bytes:
    """What all of them allow."""
    mask: Mask = functools.reduce(np.bitwise_and, [matcher.allowed() for matcher in matchers])
    return mask.tobytes()
