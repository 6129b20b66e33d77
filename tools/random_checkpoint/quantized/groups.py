"""Integers with a scale and a zero for each group of inputs, and words of 32 bits of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Grouped(NamedTuple):
    numbers: Tensor  # [out, in] int64, from 0
    scales: Tensor  # [out, groups] float16
    zeros: Tensor  # [out, groups] int64


def quantize_groups(weight: Tensor, groups: Tensor, bits: int, is_symmetric: bool) -> Grouped:
    """The nearest numbers. groups: [in], the group of each input. Only the last may be shorter."""
    count, most = int(groups.max()) + 1, (1 << bits) - 1
    size = int((groups == 0).sum())
    order = torch.argsort(groups, stable=True)
    parts = F.pad(weight[:, order].float(), (0, count * size - len(order))).unflatten(1, (count, size))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    if is_symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).clamp(min=1e-5).half()
    zeros = torch.full(scales.shape, (most + 1) // 2)
    if not is_symmetric:
        zeros = (-low / scales.float()).round().clamp(0, most).long()
    found = (parts / scales.float()[..., None]).round() + zeros[..., None]
    numbers = torch.empty(weight.shape, dtype=torch.int64)
    numbers[:, order] = found.clamp(0, most).long().flatten(1)[:, : len(order)]
    return Grouped(numbers, scales, zeros)


def words(numbers: Tensor, bits: int) -> Tensor:
    """[…] int32 of […, 32 / bits], the first number in the lowest bits."""
    shifts = torch.arange(numbers.shape[-1]) * bits
    return (numbers.long() << shifts).sum(-1).to(torch.int32)
