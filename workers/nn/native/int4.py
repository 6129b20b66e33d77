"""Weights of 4 bits in the panels of `quantized_panels.py`, quantised here.

Groups have zeros, since without them the squared error of trained weights is 1.3 times as large; and 32 inputs,
since with 128 it is 1.5 times as large (at 4.06 bits a weight, not 4.25).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.nn.native.huge_pages import advise
from workers.nn.native.quantized_panels import BLOCK, OUTPUTS, QuantizedPanels, few_rows

GROUP = 32  # inputs with one step and zero; kernels.h has the same
PART = 256  # outputs that are quantised at a time: a multiple of OUTPUTS, and little enough for a cache


class PackedInt4(NamedTuple):
    """A weight [out, in] of numbers (q - zero) · size · scale: q and zero of 4 bits, and sizes from 1 to 16.
    Of each group of inputs an output has one size and zero, which make its weights whole numbers of 8 bits;
    scales are those of an output."""

    numbers: Tensor  # [panels, groups, 64 + 64 · GROUP / 2] uint8, steps in front
    in_features: int
    out_features: int
    sums: Tensor  # [out] int32
    scales: Tensor  # [out] float32

    @property
    def panels(self) -> QuantizedPanels:
        """Valid as long as `numbers` lives."""
        return QuantizedPanels(
            self.numbers.data_ptr(), self.in_features, self.out_features,
            self.numbers.stride(0), 4, self.sums, self.scales, few_rows(),
        )  # fmt: skip


def pack_int4(weight: Tensor) -> PackedInt4:
    """Of a weight [out, in]."""
    out_features, in_features = weight.shape
    groups = -(-in_features // BLOCK) * BLOCK // GROUP
    numbers = torch.empty(
        (-(-out_features // OUTPUTS), groups, OUTPUTS * (1 + GROUP // 2)), dtype=torch.uint8
    )
    advise(numbers.data_ptr(), numbers.numel())
    sums, scales = torch.empty(out_features, dtype=torch.int32), torch.empty(out_features)
    for start in range(0, out_features, PART):
        part = slice(start, min(start + PART, out_features))
        quantized = _quantize_part(weight[part])
        count, first = part.stop - start, start // OUTPUTS
        scales[part] = quantized.scales[:count]
        sums[part] = quantized.whole().sum(dim=(1, 2), dtype=torch.int32)[:count]
        numbers[first : first + len(quantized.q) // OUTPUTS] = _lay_out(quantized)
    return PackedInt4(numbers, in_features, out_features, sums, scales)


def dequantized(weight: Tensor) -> Tensor:
    """A weight [out, in] as its numbers of 4 bits stand for it."""
    out = torch.empty_like(weight)
    for part, rounded in zip(weight.split(PART), out.split(PART), strict=True):
        quantized = _quantize_part(part)
        wide = quantized.whole().flatten(1) * quantized.scales[:, None]
        rounded.copy_(wide[: len(part), : part.shape[1]])
    return out


class QuantizedInt4(NamedTuple):
    """Of a weight [out, groups · GROUP]. All in float32 but what they hold: whole numbers."""

    q: Tensor  # [out, groups, GROUP]
    sizes: Tensor  # [out, groups, 1], 1 to 16
    zeros: Tensor  # [out, groups, 1], 0 to 15
    scales: Tensor  # [out]

    def whole(self) -> Tensor:
        """[out, groups, GROUP], -128 to 127: the weight is these times `scales`."""
        return (self.q - self.zeros) * self.sizes


def quantize_int4(weight: Tensor) -> QuantizedInt4:
    """Of the sizes around the one that covers a group's range, the one with the least squared error."""
    scales = weight.abs().amax(dim=1).clamp_(min=1e-8) / 127
    x = (weight / scales[:, None]).view(len(weight), -1, GROUP)
    low, high = x.aminmax(dim=2, keepdim=True)
    covering, middle = ((high - low) / 15).round_(), (high + low) / 2
    sizes = zeros = errors = torch.empty(0)
    for step in (0, -1, 1):
        size = (covering + step).clamp_(1, 16)
        zero = (7.5 - middle / size).round_().clamp_(0, 15)
        error = (_nearest(x, size, zero).sub_(zero).mul_(size) - x).square_().sum(dim=2, keepdim=True)
        if not len(errors):
            sizes, zeros, errors = size, zero, error
        else:
            is_better = error < errors
            sizes, zeros = torch.where(is_better, size, sizes), torch.where(is_better, zero, zeros)
            errors = torch.minimum(error, errors)
    return QuantizedInt4(_nearest(x, sizes, zeros), sizes, zeros, scales)


def _quantize_part(weight: Tensor) -> QuantizedInt4:
    """With zeros around it, in whole panels."""
    count, in_features = weight.shape
    shape = -(-count // OUTPUTS) * OUTPUTS, -(-in_features // BLOCK) * BLOCK
    padded = torch.zeros(shape)
    padded[:count, :in_features] = weight
    return quantize_int4(padded)


def _nearest(x: Tensor, size: Tensor, zero: Tensor) -> Tensor:
    """The numbers q whose (q - zero) · size are nearest to x, and within 8 bits."""
    least = torch.clamp(zero - (128 / size).floor_(), min=0)
    most = torch.clamp(zero + (127 / size).floor_(), max=15)
    return torch.div(x, size).round_().add_(zero).clamp_(least, most)


def _lay_out(quantized: QuantizedInt4) -> Tensor:
    """[panels, groups, 64 + 64 · GROUP / 2] uint8"""
    count, groups, _ = quantized.q.shape
    panels = count // OUTPUTS
    # Of the panel's four vectors of 16 outputs, the second and the last are in the upper halves of bytes.
    q = quantized.q.to(torch.uint8).view(panels, 2, 2, 16, groups, GROUP // 4, 4)
    both = q[:, :, 0] | q[:, :, 1] << 4  # [panels, 2, 16, groups, fours, 4]
    numbers = both.permute(0, 3, 4, 1, 2, 5).reshape(panels, groups, -1)
    steps = (quantized.sizes - 1 + 16 * quantized.zeros).to(torch.uint8)
    return torch.cat([steps.view(panels, OUTPUTS, groups).transpose(1, 2), numbers], dim=2)
