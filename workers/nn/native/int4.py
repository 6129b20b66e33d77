"""Weights of 4 bits in the panels of `quantized_panels.py`, quantised here.

Groups have zeros, since without them the squared error of trained weights is 1.3 times as large; and 32
inputs, since with 128 it is 1.5 times as large (at 4.06 bits a weight, not 4.25).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.huge_pages import advise
from workers.nn.native.quantized_panels import (
    BLOCK,
    OUTPUTS,
    QuantizedPanels,
    make_panels,
    quantized_kernels,
)

GROUP = 32  # inputs with one step and zero; kernels.h has the same
PART = 256  # outputs that torch quantises at a time: few enough for a cache


def pack_int4(weight: Tensor) -> QuantizedPanels:
    """Of a weight [out, in] in float32 or bfloat16. Needs `quantized_kernels`.

    Its numbers are (q - zero) · size · scale: q and zero of 4 bits, and sizes from 1 to 16. Of each group of
    inputs an output has one size and zero, which make its weights whole numbers of 8 bits; scales are those
    of an output. Panels are [groups, 64 + 64 · GROUP / 2] uint8, sizes and zeros in front.
    """
    assert operators.kernels is not None
    weight = weight.contiguous()
    out_features, in_features = weight.shape
    groups = -(-in_features // BLOCK) * BLOCK // GROUP
    numbers = torch.empty(
        (-(-out_features // OUTPUTS), groups, OUTPUTS * (1 + GROUP // 2)), dtype=torch.uint8
    )
    advise(numbers.data_ptr(), numbers.numel())
    sums, scales = torch.empty(out_features, dtype=torch.int32), torch.empty(out_features)
    if "vnni" in quantized_kernels():
        operators.kernels.quantize_int4(
            numbers.data_ptr(), sums.data_ptr(), scales.data_ptr(), weight.data_ptr(), out_features,
            in_features, numbers.stride(0), operators.IS_HALF[weight.dtype],
        )  # fmt: skip
    else:
        pack_with_torch(weight, numbers, sums, scales)
    return make_panels(numbers, in_features, 4, sums, scales)


def pack_with_torch(weight: Tensor, numbers: Tensor, sums: Tensor, scales: Tensor) -> None:
    """Of a weight [out, in]: `numbers`, `sums` and `scales` as `pack_int4` has them, without AVX-512."""
    parts = zip(
        weight.split(PART), numbers.split(PART // OUTPUTS), sums.split(PART), scales.split(PART), strict=True
    )
    for part, panels, of_part, scale in parts:
        quantized = quantize_int4(F.pad(part.float(), (0, -part.shape[1] % GROUP)))
        scale.copy_(quantized.scales)
        of_part.copy_(quantized.whole().flatten(1).sum(dim=1))
        steps = (quantized.sizes - 1 + 16 * quantized.zeros).to(torch.uint8)
        groups = panels.shape[1]
        behind = (0, 0, 0, groups - quantized.q.shape[1], 0, -len(part) % OUTPUTS)
        panels[..., :OUTPUTS] = F.pad(steps, behind).view(-1, OUTPUTS, groups).transpose(1, 2)
        # Two outputs in a byte are 16 apart.
        q = F.pad(quantized.q.to(torch.uint8), behind).view(-1, OUTPUTS // 32, 2, 16, groups, GROUP // 4, 4)
        two = q[:, :, 0] + 16 * q[:, :, 1]
        panels[..., OUTPUTS:] = two.permute(0, 3, 4, 1, 2, 5).flatten(2)


def dequantized(weight: Tensor) -> Tensor:
    """A weight [out, in], of any type, as its numbers of 4 bits stand for it. With torch's operators."""
    out = torch.empty_like(weight)
    for part, rounded in zip(weight.split(PART), out.split(PART), strict=True):
        in_features = part.shape[1]
        quantized = quantize_int4(F.pad(part.float(), (0, -in_features % GROUP)))
        wide = quantized.whole().flatten(1) * quantized.scales[:, None]
        rounded.copy_(wide[:, :in_features])
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
    low, high = low.clamp_(max=0), high.clamp_(min=0)  # a zero beyond the 16 numbers has no bits
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


def _nearest(x: Tensor, size: Tensor, zero: Tensor) -> Tensor:
    """The numbers q whose (q - zero) · size are nearest to x, and within 8 bits."""
    least = torch.clamp(zero - (128 / size).floor_(), min=0)
    most = torch.clamp(zero + (127 / size).floor_(), max=15)
    return torch.div(x, size).round_().add_(zero).clamp_(least, most)
