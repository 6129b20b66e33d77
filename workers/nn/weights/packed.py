"""Numbers of 4 or 8 bits in words of 32, the lowest bits first, as all makers of such files pack them."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native.repack import repack_inputs, takes_words
from workers.nn.weights.grouped import BLOCK, COMMON_ZERO, NumberKind

LOW = 0x0F0F0F0F0F0F0F0F  # of each byte
KINDS = {4: NumberKind.INT4, 8: NumberKind.INT8}


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n · 32 / bits] uint8, of words [rows, n] int32."""
    # Flat: of a single column torch calls any order of memory contiguous, but views no such bytes.
    octets = words.flatten().view(torch.uint8).view(len(words), 4 * words.shape[1])
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def paired(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of words of two inputs' numbers of 4 bits: each byte of the results has a number of the first, and one
    of the second in its high half; the even numbers, and the odd ones."""
    low = LOW if first.dtype == torch.int64 else LOW & 0x7FFFFFFF
    even = (second & low).bitwise_left_shift_(4).bitwise_or_(first & low)
    odd = (first >> 4).bitwise_and_(low).bitwise_or_(second & ~low)
    return even, odd


def blocks_of(words: Tensor) -> Tensor:
    """Numbers of 4 bits in the layout's blocks of 32 inputs, [rows, n · 4] bytes, of words [rows, n] int32
    that have them in order. n: a multiple of 4."""
    if not words.is_contiguous() or words.storage_offset() % 2 or words.stride(0) % 2:
        words = words.clone(memory_format=torch.contiguous_format)  # so that words of 64 bits begin there
    halves = words.view(torch.int64).unflatten(1, (-1, 2))
    blocks = torch.empty(len(words), 4 * words.shape[1], dtype=torch.uint8, device=words.device)
    pairs = blocks.view(len(words), -1, 8, 2)
    for place, numbers in enumerate(paired(halves[:, :, 0], halves[:, :, 1])):
        pairs[..., place] = numbers.view(torch.uint8).unflatten(1, (-1, 8))
    return blocks


def put_blocks(words: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Fills out [n, m / 2] with the layout's blocks, of words [n, k] int32, each with eight inputs of an
    output. order: [m], which of the inputs stands there; None: as they are. m: a multiple of 32."""
    if takes_words(words, out):
        repack_inputs(words, order, out)
    elif order is None:
        out.copy_(blocks_of(words))
    else:
        out.copy_(ordered_blocks(words.t(), order.to(words.device)))


def ordered_blocks(words: Tensor, order: Tensor) -> Tensor:
    """Numbers of 4 bits in the layout's blocks [rows, m / 2], of words [n, rows] int32, each with eight
    inputs of a row. order: [m], which of the inputs stands there; m: a multiple of 32."""
    octets = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    inputs = octets.new_empty(len(words), 8, words.shape[1])
    for place in range(4):
        inputs[:, 2 * place] = octets[:, :, place] & 15
        inputs[:, 2 * place + 1] = octets[:, :, place] >> 4
    halves = inputs.flatten(0, 1).index_select(0, order).unflatten(0, (-1, 2, BLOCK // 2))
    blocks: Tensor = (halves[:, 1] << 4).bitwise_or_(halves[:, 0])
    return blocks.flatten(0, 1).t()


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
