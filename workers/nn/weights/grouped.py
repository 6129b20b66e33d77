"""Matrices of small numbers, with a scale for each group of inputs: the one layout that all quantised
checkpoints are read into, for every device.

    weight[o, i] = (number[o, i] - zero[o, g]) · scale[o, g]        g: the group of input i

Each output has its numbers side by side, so that a kernel reads a weight as one stream, and a rank's part of
the outputs is a part of the memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native.huge_pages import advise
from workers.nn.weights.base import Activations, Linear

BLOCK = 32  # inputs: groups are multiples of it
CHUNK = (
    128  # inputs that a kernel takes at a time: 1, 2 or 4 groups, or a part of one; outputs are padded to it
)
TILE_NUMBERS = 1 << 20  # widened at a time: few enough for a cache


class NumberKind(StrEnum):
    INT4 = "int4"  # 0 to 15, two in a byte
    INT8 = "int8"  # -128 to 127
    FP8 = "fp8"  # e4m3


_DTYPES = {NumberKind.INT4: torch.uint8, NumberKind.INT8: torch.int8, NumberKind.FP8: torch.float8_e4m3fn}
# The zero of all groups where a weight has no zeros of its own.
COMMON_ZERO = {NumberKind.INT4: 8, NumberKind.INT8: 0, NumberKind.FP8: 0}


class GroupedWeight(NamedTuple):
    """A matrix [out_features, in_features].

    Of 4 bits each block of 32 inputs has 16 bytes: in the low halves its first 16 inputs, in the high halves
    the others.
    """

    kind: NumberKind
    numbers: Tensor  # [out, padded inputs · bits / 8]: uint8, int8 or float8_e4m3fn
    scales: Tensor  # [out, groups] float32
    zeros: Tensor | None  # [out, groups] uint8 for INT4, int8 for INT8; None: `COMMON_ZERO`
    group_size: int  # 32, 64 or a multiple of 128; the last group may be shorter
    in_features: int
    num_inputs: int  # of the layout: more than in_features where `order` repeats some
    order: Tensor | None  # [num_inputs] int64: which input of the layer stands there; None: as they are

    @property
    def out_features(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device) -> GroupedWeight:
        return self._replace(
            numbers=self.numbers.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    def ordered(self, x: Tensor) -> Tensor:
        """The inputs [rows, num_inputs] in the layout's order, of x [rows, in_features]."""
        return x if self.order is None else x.index_select(1, self.order)

    def widened(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some outputs [n, num_inputs], with the inputs in the layout's order. With torch's operators."""
        groups = self.scales[rows, :, None]
        count, num_groups = groups.shape[:2]
        wide = _unpacked(self.kind, self.numbers[rows]).float()
        wide = F.pad(wide, (0, num_groups * self.group_size - wide.shape[1])).view(count, num_groups, -1)
        zero = COMMON_ZERO[self.kind]
        if self.zeros is not None:
            wide = wide - self.zeros[rows, :, None]
        elif zero:
            wide = wide - zero
        return (wide * groups).view(count, -1)[:, : self.num_inputs].to(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in], with the inputs as the layer has them."""
        wide = self.widened(slice(None), dtype)
        if self.order is None:
            return wide
        # Of an input that stands in several places one has its weight, the others have 0.
        return wide.new_zeros(len(wide), self.in_features).index_add_(1, self.order, wide)


# (x [rows, in], bias, residual): x Wᵀ + bias + residual, of one weight.
Product = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def choose_product(weight: GroupedWeight, activations: Activations = Activations.AUTO) -> Product | None:
    """The kernels of the weight's device; None: torch's operators. Triton is imported only where there is a
    GPU.

    Raises ValueError where there are none for such activations.
    """
    device = weight.numbers.device
    if device.type == "cpu":
        from workers.nn.weights.grouped_cpu import make_cpu_product

        return make_cpu_product(weight, activations)
    if activations is Activations.INT8:
        raise ValueError(f"there are no activations in 8 bits on {device}")
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from workers.nn.weights.grouped_cuda import make_cuda_product

    return make_cuda_product(weight, may_round=activations is not Activations.NONE)


class GroupedLinear(Linear):
    """By kernels, where there are any; else it widens a part of the weight at a time, and multiplies by
    it."""

    def __init__(
        self,
        weight: GroupedWeight,
        bias: Tensor | None = None,
        choose: Callable[[GroupedWeight], Product | None] = choose_product,
    ) -> None:
        super().__init__(weight.out_features, weight.in_features)
        self.weight, self._bias, self._product = weight, bias, choose(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(x, self._bias, None)
        x = self.weight.ordered(x)
        out = x.new_empty(len(x), self.out_features)
        step = max(BLOCK, TILE_NUMBERS // self.weight.num_inputs)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            torch.mm(x, self.weight.widened(part, x.dtype).t(), out=out[:, part])
        return out if self._bias is None else out.add_(self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(x, self._bias, residual)
        return super().add_to(residual, x)


class Arrangement:
    """Where the inputs of a matrix stand in the layout, by their groups, and how parts of it are put there.

    Inputs whose groups do not come in blocks are put in order, and each group is padded to whole blocks.
    """

    def __init__(self, groups: Tensor) -> None:
        """groups: [in] int64, on the host: the group of each input, in any order and of any sizes."""
        self.in_features = len(groups)
        order: Tensor | None = None
        if bool((groups[1:] < groups[:-1]).any()):
            order = torch.argsort(groups, stable=True)
        ordered = groups if order is None else groups[order]
        starts = (torch.nonzero(ordered[1:] != ordered[:-1]).flatten() + 1).tolist()
        is_padding = None
        if any(start % BLOCK for start in starts):
            order, is_padding, starts = _padded_order(order, [*starts, self.in_features])
        self.group_size = _group_size(starts, self.in_features)
        self.order, self._is_padding = order, is_padding
        self.has_blocks = is_padding is None  # no input is padding between others
        self._groups = groups if order is None else groups[order]
        self.num_inputs = len(self._groups)
        # The first input of each group has its scale.
        self._of_group = self._groups[torch.arange(0, self.num_inputs, self.group_size)]

    def empty(
        self, kind: NumberKind, out_features: int, has_zeros: bool, device: torch.device
    ) -> GroupedWeight:
        """A weight whose rows `put` fills."""
        num_groups, width = len(self._of_group), -(-self.num_inputs // CHUNK) * CHUNK
        dtype = _DTYPES[kind]
        if kind is NumberKind.INT4:
            width //= 2
        zeros = torch.empty(out_features, num_groups, dtype=dtype, device=device) if has_zeros else None
        numbers = torch.empty(out_features, width, dtype=dtype, device=device)
        if device.type == "cpu":
            advise(numbers.data_ptr(), numbers.numel() * numbers.itemsize)
        return GroupedWeight(
            kind, numbers,
            torch.empty(out_features, num_groups, device=device), zeros,
            self.group_size, self.in_features, self.num_inputs,
            None if self.order is None else self.order.to(device),
        )  # fmt: skip

    def put(
        self, weight: GroupedWeight, rows: slice, numbers: Tensor, scales: Tensor, zeros: Tensor | None
    ) -> None:
        """Fills some outputs: numbers [n, in], of 4 bits one in a byte; scales and zeros [n, num_groups]."""
        device = numbers.device
        self._put_scales(weight, rows, scales, zeros)
        if self.order is not None:
            # Float8 has no operator that picks.
            numbers = numbers.view(torch.uint8).index_select(1, self.order.to(device)).view(numbers.dtype)
        if self._is_padding is not None:
            padding, groups = self._is_padding.to(device), self._groups.to(device)
            numbers = _without(weight.kind, numbers, zeros, groups, padding)
        _pack(weight.kind, numbers, weight.numbers[rows])

    def blocks(self, weight: GroupedWeight, rows: slice, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """As `put`, for numbers of 4 bits that are in the layout's blocks already: where they belong
        [n, num_inputs / 2] uint8. Only where `has_blocks`."""
        self._put_scales(weight, rows, scales, zeros)
        numbers, count = weight.numbers[rows], self.num_inputs // 2
        numbers[:, count:] = 0
        return numbers[:, :count]

    def _put_scales(self, weight: GroupedWeight, rows: slice, scales: Tensor, zeros: Tensor | None) -> None:
        weight.scales[rows] = self._by_group(scales)
        if weight.zeros is not None:
            weight.zeros[rows] = COMMON_ZERO[weight.kind] if zeros is None else self._by_group(zeros)

    def _by_group(self, values: Tensor) -> Tensor:
        """[n, groups of the layout] of [n, num_groups]; mostly they are the same."""
        count = len(self._of_group)
        if values.shape[1] == count and torch.equal(self._of_group, torch.arange(count)):
            return values
        return values[:, self._of_group.to(values.device)]

    def nothing(self, weight: GroupedWeight, rows: slice) -> None:
        """Fills some outputs with weights of 0."""
        weight.numbers[rows].view(torch.uint8).zero_()
        weight.scales[rows] = 0
        if weight.zeros is not None:
            weight.zeros[rows] = 0


def arrange(
    kind: NumberKind, numbers: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor
) -> GroupedWeight:
    """The layout of numbers [out, in] (of 4 bits: one in a byte), and of scales and zeros [out, num_groups].

    groups: as `Arrangement` takes them.
    """
    arrangement = Arrangement(groups)
    weight = arrangement.empty(kind, len(numbers), zeros is not None, numbers.device)
    arrangement.put(weight, slice(None), numbers, scales, zeros)
    return weight


def stack(weights: Sequence[GroupedWeight]) -> GroupedWeight | None:
    """The outputs of several weights as one; None where their layouts differ."""
    first, *others = weights
    for other in others:
        if (other.kind, other.group_size, other.num_inputs) != (
            first.kind,
            first.group_size,
            first.num_inputs,
        ):
            return None
        if (other.order is None) != (first.order is None) or (other.zeros is None) != (first.zeros is None):
            return None
        if other.order is not None and first.order is not None and not torch.equal(other.order, first.order):
            return None
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    return first._replace(
        numbers=torch.cat([weight.numbers for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def _group_size(starts: Sequence[int], num_inputs: int) -> int:
    """The largest that a kernel takes, whose multiples all groups begin at."""
    size = gcd(*starts) if starts else -(-num_inputs // CHUNK) * CHUNK
    return size if size % CHUNK == 0 else gcd(size, CHUNK)


def _padded_order(order: Tensor | None, stops: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Each group in whole blocks: its inputs and, as padding, its first one again. Which of them are padding.
    Where the groups start, but the first."""
    inputs = torch.arange(stops[-1]) if order is None else order
    parts: list[Tensor] = []
    paddings: list[Tensor] = []
    for start, stop in zip((0, *stops), stops, strict=False):
        count = -(stop - start) % BLOCK
        parts += inputs[start:stop], inputs[start].expand(count)
        paddings += torch.zeros(stop - start, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    lengths = [-(-(stop - start) // BLOCK) * BLOCK for start, stop in zip((0, *stops), stops, strict=False)]
    return torch.cat(parts), torch.cat(paddings), list(accumulate(lengths))[:-1]


def _without(
    kind: NumberKind, numbers: Tensor, zeros: Tensor | None, groups: Tensor, is_padding: Tensor
) -> Tensor:
    """Weights of 0 for padding, whose input may be any."""
    if zeros is None:
        nothing: Tensor = torch.tensor(COMMON_ZERO[kind]).to(numbers.dtype)
        return torch.where(is_padding, nothing, numbers)
    return torch.where(is_padding, zeros[:, groups].to(numbers.dtype), numbers)


def _pack(kind: NumberKind, numbers: Tensor, out: Tensor) -> None:
    """Into rows of the layout, with zeros behind."""
    if kind is not NumberKind.INT4:
        wide, count = numbers.view(torch.uint8), numbers.shape[1]
        out.view(torch.uint8)[:, :count] = wide
        out.view(torch.uint8)[:, count:] = 0
        return
    behind = -numbers.shape[1] % CHUNK
    padded = F.pad(numbers, (0, behind)) if behind else numbers
    blocks = padded.view(len(padded), -1, 2, BLOCK // 2)
    halves = out.view(len(out), -1, BLOCK // 2)
    torch.bitwise_left_shift(blocks[:, :, 1], 4, out=halves)
    halves |= blocks[:, :, 0]


def _unpacked(kind: NumberKind, numbers: Tensor) -> Tensor:
    if kind is not NumberKind.INT4:
        return numbers
    blocks = numbers.view(len(numbers), -1, BLOCK // 2)
    return torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1)
