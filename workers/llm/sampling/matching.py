"""Rules that need tokens on the host, such as grammars: each request with a rule has a matcher.

    start(params, tokens) → allowed() → the token is chosen → accept(token_ids) → allowed() → …

Only rank 0 has matchers. They are started in a thread, before the request is admitted (`matcher_starts.py`).
The forward of step n + 1 starts with the tokens of step n on the device. Meanwhile matchers accept these
tokens on the host, and make the masks of the next ones. Only the choice for rows with a matcher waits for
masks (`ModelRunner.choose`). Other ranks get them in a message behind the plan (`TokenMasks`). No torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.tokens import TokensSoFar

Mask = npt.NDArray[np.uint8]  # [vocab / 8]: one bit per token, the lowest first; set: allowed


class Matcher(Protocol):
    """Follows the output of one request. Its methods raise RequestError, which ends the request."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes the next output tokens. Not called with the tokens that end the request."""
        ...

    @property
    def is_over(self) -> bool:
        """No token may come next: the request ends as if with a token that ends it."""
        ...

    def allowed(self) -> Mask:
        """The tokens that may come next; at least one, unless `is_over`."""
        ...

    def allowed_behind(self, drafts: Sequence[int]) -> list[Mask]:
        """The tokens that may come behind each of these, which are only guesses: they are not taken.

        The list is shorter where one of them may not come, and where the request would end with it or fail
        behind it.
        """
        ...


class HostRule(Protocol):
    def is_asked(self, params: SamplingParams) -> bool:
        """Whether a request uses the rule."""
        ...

    def start(self, params: SamplingParams, tokens: TokensSoFar, compiled: bytes | memoryview) -> Matcher:
        """For a request that uses the rule and has these tokens, earlier attempts included.

        `compiled` is the frame behind its `GenerateRequest`. Raises RequestError.
        """
        ...


def mask_of(matchers: Sequence[Matcher]) -> bytes:
    """The tokens that all of them allow."""
    return _join([matcher.allowed() for matcher in matchers])


def masks_behind(matchers: Sequence[Matcher], drafts: Sequence[int]) -> list[bytes]:
    """The tokens that all of them allow behind each of these guesses; up to the first that is not allowed."""
    found = [matcher.allowed_behind(drafts) for matcher in matchers]
    return [_join(masks) for masks in zip(*found, strict=False)]


def _join(masks: Sequence[Mask]) -> bytes:
    joined: Mask = functools.reduce(np.bitwise_and, masks)
    return joined.tobytes()
