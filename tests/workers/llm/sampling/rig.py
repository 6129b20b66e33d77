"""Samplers for tests: one step, or many tokens of one request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart
from workers.llm.sampling.base import Processor, Setup
from workers.llm.sampling.choice import Kernel
from workers.llm.sampling.sampler import Sampled, Sampler, make_processors

EOS = 2
CPU = torch.device("cpu")
ROWS = 100  # of a step


def make_setup(num_slots: int, vocab_size: int, device: torch.device = CPU) -> Setup:
    return Setup(num_slots, vocab_size, (EOS,), device)


def make_sampler(
    num_slots: int,
    vocab_size: int,
    further: Sequence[Processor] = (),
    kernel: Kernel | None = None,
    device: torch.device = CPU,
) -> Sampler:
    setup = make_setup(num_slots, vocab_size, device)
    return Sampler(setup, (*make_processors(setup), *further), kernel)


def start(
    sampler: Sampler,
    slot: int,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> None:
    sampler.start(SequenceStart(slot, len(prompt), params, pack_int32([*prompt, *output])))


def sample(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[int]) -> Sampled:
    """One step of a fresh sampler: row i is the token `numbers[i]` of a request with an empty prompt."""
    sampler = make_sampler(len(params), logits.shape[-1])
    for slot, one in enumerate(params):
        start(sampler, slot, one)
    return sampler.sample(logits.clone(), np.arange(len(params)), np.array(numbers))


def draw_many(
    logits: Tensor,
    params: SamplingParams,
    count: int,
    kernel: Kernel | None = None,
    device: torch.device = CPU,
) -> list[int]:
    """Tokens 0 … count - 1 of one request, all by these logits [vocab], or by their own [count, vocab]."""
    sampler = make_sampler(1, logits.shape[-1], kernel=kernel, device=device)
    start(sampler, 0, params)
    rows, drawn = logits.to(device).expand(count, -1), []
    for first in range(0, count, ROWS):
        part = rows[first : first + ROWS].clone()  # processors write over it
        numbers = np.arange(first, first + len(part))
        drawn += sampler.sample(part, np.zeros(len(part), dtype=np.int64), numbers).token_ids.tolist()
    return drawn
