"""Numbers of 4 or 8 bits in words of 32, the lowest bits first, as all makers of such files pack them."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.weights.grouped import COMMON_ZERO, NumberKind

KINDS = {4: NumberKind.INT4, 8: NumberKind.INT8}


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n · 32 / bits] uint8, of words [rows, n] int32."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def words_of(numbers: slice, bits: int) -> tuple[slice, slice]:
    """The words that have these numbers, and where in the words' numbers they are."""
    count = 32 // bits
    first, last = numbers.start // count, -(-numbers.stop // count)
    start = numbers.start - first * count
    return slice(first, last), slice(start, start + numbers.stop - numbers.start)


def as_kind(unsigned: Tensor, bits: int) -> Tensor:
    """Unsigned numbers, or zeros, as the layout has them: those of 8 bits with their middle at 0."""
    return unsigned if bits == 4 else (unsigned ^ 128).view(torch.int8)


def without_common(zeros: Tensor, kind: NumberKind) -> Tensor | None:
    """None for zeros that are the layout's own."""
    return None if bool((zeros == COMMON_ZERO[kind]).all()) else zeros
