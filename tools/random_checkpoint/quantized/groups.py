"""Integers with a scale and a zero for each group of inputs, and words of 32 bits of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grouped(NamedTuple):
    numbers: Tensor  # [out, in] int64, from 0
    scales: Tensor  # [out, groups] float16
    zeros: Tensor  # [out, groups] int64


def quantize_groups(weight: Tensor, groups: Tensor, bits: int, is_symmetric: bool) -> Grouped:
    """The nearest numbers. groups: [in], the group of each input."""
    count, most = int(groups.max()) + 1, (1 << bits) - 1
    scales = torch.empty(len(weight), count, dtype=torch.float16)
    zeros = torch.full((len(weight), count), (most + 1) // 2)
    numbers = torch.empty(weight.shape, dtype=torch.int64)
    for group in range(count):
        members = groups == group
        part = weight[:, members].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if is_symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / most).clamp(min=1e-5).half()
        if not is_symmetric:
            zeros[:, group] = (-low / scale.float()).round().clamp(0, most).long()
        found = (part / scale.float()[:, None]).round() + zeros[:, group, None]
        numbers[:, members] = found.clamp(0, most).long()
        scales[:, group] = scale
    return Grouped(numbers, scales, zeros)


def words(numbers: Tensor, bits: int) -> Tensor:
    """[…] int32 of […, 32 / bits], the first number in the lowest bits."""
    shifts = torch.arange(numbers.shape[-1]) * bits
    return (numbers.long() << shifts).sum(-1).to(torch.int32)
