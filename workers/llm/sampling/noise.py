"""The random numbers of a draw: one for each token of the vocabulary, counter-based and stateless.

A number depends only on (seed, index of the output token, token id). Its 64 bits are SplitMix64's (Steele,
Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): the token id is the counter in the stream
that starts at `draw_keys`. Only integer operations are used, so that numpy, torch on any device and the
Triton kernel get the same bits.

A token is chosen by a race of exponential times (Gumbel's method without its outer logarithm): the token with
the smallest -log(u) / weight wins, with a probability of its weight among all weights. A token's time depends
on its own logit alone. So rounding noise in logits changes a choice only where two times agree to as many
bits. Inverting the cumulative distribution instead would add up the noise of all tokens before the chosen
one.

Small times matter, and -log(u) is small where u is close to 1, where float32 has only 24 bits. So the 63
lower bits are 1 - u, as float32: 24 significant bits down to 2^-63. Then -log(u) = -log1p(-(1 - u)), which
float32 computes to an ulp or two: its relative error, which is the relative error of a token's probability,
is below 5e-7. Two ends are clamped: 1 - u is never below 2^-64, which gives all tokens together at most
vocabulary · 2^-63 (2e-14) too much; and never above 1 - 2^-24, so that no time exceeds 16.6 (one of 1.7e7
would).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.nn.loader import to_device

UInt64Array = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHIFT_1, SHIFT_2, SHIFT_3 = 30, 27, 31
LOW_BITS = (1 << 63) - 1
UNIT = 2.0**-63  # of the low bits
MAX_ROWS = 4  # at once: more leave a CPU's cache, fewer synchronise its threads more often
SMALLEST, LARGEST = 2.0**-64, 1 - 2.0**-24  # of 1 - u


def mix(state: UInt64Array) -> UInt64Array:
    """SplitMix64's output function."""
    state = (state ^ (state >> np.uint64(SHIFT_1))) * np.uint64(MIX_1)
    state = (state ^ (state >> np.uint64(SHIFT_2))) * np.uint64(MIX_2)
    return state ^ (state >> np.uint64(SHIFT_3))


def draw_keys(seeds: UInt64Array, numbers: UInt64Array) -> UInt64Array:
    """The start of each output token's random stream: an output of SplitMix64, from the seed.

    `numbers`: output tokens of the request before this one.
    """
    golden = np.uint64(GOLDEN)
    return mix(mix(seeds + golden) + (numbers + np.uint64(1)) * golden)


class Noise:
    """The random numbers of a vocabulary's tokens on a device, for up to MAX_ROWS rows at once.

    The next call overwrites the results: malloc returns arrays of this size to the system, and mapping them
    anew costs more than the computation.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        counters = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        self._device = device
        self._counters = to_device(counters.view(np.int64), device)  # [vocab] int64
        self._bits = torch.empty(MAX_ROWS * vocab_size, dtype=torch.int64, device=device)
        self._shifted = torch.empty_like(self._bits)
        self._result = torch.empty(MAX_ROWS * vocab_size, dtype=torch.float32, device=device)

    def bits(self, keys: UInt64Array, token_ids: Tensor | None = None) -> Tensor:
        """SplitMix64's outputs [num_rows, n] int64 of the streams `keys`, for n tokens or for all."""
        counters = self._counters if token_ids is None else self._counters[token_ids]
        shape = len(keys), len(counters)
        size = shape[0] * shape[1]
        bits: Tensor = self._bits[:size].view(shape)
        shifted: Tensor = self._shifted[:size].view(shape)
        torch.add(counters, to_device(keys.view(np.int64), self._device)[:, None], out=bits)
        for shift, factor in ((SHIFT_1, MIX_1), (SHIFT_2, MIX_2)):
            bits.bitwise_xor_(_shift(bits, shift, shifted)).mul_(_signed(factor))
        mixed: Tensor = bits.bitwise_xor_(_shift(bits, SHIFT_3, shifted))
        return mixed

    def log_uniforms(self, keys: UInt64Array, token_ids: Tensor | None = None) -> Tensor:
        """log(u) [num_rows, n] float32, u uniform in (0, 1)."""
        bits = self.bits(keys, token_ids).bitwise_and_(LOW_BITS)
        result = self._result[: bits.numel()].view(bits.shape).copy_(bits)
        return result.mul_(-UNIT).clamp_(-LARGEST, -SMALLEST).log1p_()


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64: torch's signed integers wrap like unsigned ones."""
    return value - (1 << 64) if value >> 63 else value


def _shift(bits: Tensor, shift: int, out: Tensor) -> Tensor:
    """A logical right shift; torch's shift is arithmetic."""
    return torch.bitwise_right_shift(bits, shift, out=out).bitwise_and_((1 << (64 - shift)) - 1)
