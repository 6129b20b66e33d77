"""Chooses the next tokens for all rows of a step: processors change logits, then tokens are chosen.

The random numbers of token k of a request depend only on (seed, k), and no row depends on other rows. So a
request draws the same tokens in any batch, on every rank, and again when it is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.wire.packing import unpack_int32
from pipeline.wire.steps import SequenceStart
from workers.llm.sampling.allowed import AllowedTokens
from workers.llm.sampling.bans import Bans
from workers.llm.sampling.base import Int64Array, LogitRows, Processor, Setup
from workers.llm.sampling.bias import Bias
from workers.llm.sampling.choice import Kernel, TokenChoice
from workers.llm.sampling.logprobs import LogprobTable, logprobs_of
from workers.llm.sampling.masks import forbid_masked
from workers.llm.sampling.min_tokens import MinTokens
from workers.llm.sampling.penalties import Penalties
from workers.llm.sampling.thinking import ThinkingBudget
from workers.llm.sampling.tokens import TokensSoFar
from workers.nn.loader import to_device

# In the order in which they change logits.
PROCESSORS: tuple[type[Processor], ...] = (Bias, Penalties, MinTokens, AllowedTokens, Bans, ThinkingBudget)


def make_processors(setup: Setup) -> tuple[Processor, ...]:
    return tuple(kind(setup) for kind in PROCESSORS)


class Sampled(NamedTuple):
    """`logprobs` [num_rows, 1 + k] float32 and their tokens: the chosen one, then the best ones. Zeros in
    rows without logprobs."""

    token_ids: Tensor  # [num_rows] int64
    logprobs: Tensor | None
    logprob_token_ids: Tensor | None


class Sampler:
    """Keeps each running request's parameters by its slot."""

    def __init__(self, setup: Setup, processors: Sequence[Processor], kernel: Kernel | None = None) -> None:
        """Without a `kernel`, torch's operators choose, with synchronisations between device and host."""
        self._device, self._processors = setup.device, processors
        self._choice = TokenChoice(setup.num_slots, setup.vocab_size, setup.device, kernel)
        self._logprobs = LogprobTable(setup.num_slots)
        self._num_prompt_tokens = np.zeros(setup.num_slots, dtype=np.int64)
        self._is_masked = np.zeros(setup.num_slots, dtype=np.bool_)
        # Whether the slot's request uses the processor.
        self._is_asked = np.zeros((len(processors), setup.num_slots), dtype=np.bool_)

    @torch.inference_mode()
    def start(self, start: SequenceStart) -> None:
        """A request takes its slot."""
        slot, params = start.slot, start.sampling
        self._choice.start(slot, params)
        self._logprobs.start(slot, params)
        self._num_prompt_tokens[slot], self._is_masked[slot] = start.num_prompt_tokens, start.is_masked
        token_ids = unpack_int32(start.token_ids)
        tokens = TokensSoFar(token_ids[: start.num_prompt_tokens], token_ids[start.num_prompt_tokens :])
        for is_asked, processor in zip(self._is_asked, self._processors, strict=True):
            is_asked[slot] = processor.start(slot, params, tokens)

    def is_plain(self, slots: Int64Array) -> bool:
        """Whether none of these requests uses processors or logprobs."""
        return not self._is_asked[:, slots].any() and max(self.num_logprobs(slots)) < 0

    def num_logprobs(self, slots: Int64Array) -> list[int]:
        """The number of best tokens that each row asked for; -1: no logprobs at all."""
        return self._logprobs.counts(slots)

    def draw_params(self, slots: Int64Array, num_tokens: Int64Array) -> npt.NDArray[np.int32]:
        """The kernel's parameters for requests with `num_tokens` tokens so far: see `kernel.sample`."""
        return self._choice.kernel_params(slots, num_tokens - self._num_prompt_tokens[slots])

    def waits_for_masks(self, slots: Int64Array) -> npt.NDArray[np.bool_]:
        """The requests with matchers: their choice waits for masks, which rank 0 makes."""
        return self._is_masked[slots]

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, slots: Int64Array, num_tokens: Int64Array, masks: Sequence[bytes] = ()
    ) -> Sampled:
        """One token for each row of logits [num_rows, vocab] float32, whose requests have `num_tokens` tokens
        so far.

        `masks`: one for each row, or empty: see `TokenMasks`. Processors and masks overwrite their rows of
        logits.
        """
        numbers = num_tokens - self._num_prompt_tokens[slots]
        wanted = self._logprobs.wanted(logits, slots)
        for processor, places in self._asked(slots):
            processor.apply(logits, LogitRows(places, slots[places], numbers[places]))
        if masks:
            forbid_masked(logits, masks)
        token_ids = self._choice.choose(logits, slots, numbers)
        for processor, places in self._asked(slots):
            processor.accept(slots[places], token_ids[to_device(places, self._device)])
        return Sampled(token_ids, *((None, None) if wanted is None else logprobs_of(wanted, token_ids)))

    def _asked(self, slots: Int64Array) -> Iterator[tuple[Processor, Int64Array]]:
        """The processors that any of these requests use, each with the indices of its requests."""
        for processor, is_asked in zip(self._processors, self._is_asked[:, slots], strict=True):
            if is_asked.any():
                yield processor, np.flatnonzero(is_asked)
