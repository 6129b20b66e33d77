"""Dense weights, in the model's type. Layers that no other format holds are dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.native.panels import panels_of
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.experts import ListedExperts, StackedExperts
from workers.nn.weights.processor import can_pack, has_fbgemm
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard

HALF_STEP = 2.0**-24  # the smallest number that float16 has; every number near 0 is a multiple
FUSED = ("gate_up_proj", "down_proj")  # the experts of a layer in two tensors
UNFELT = 2.0**-20  # a negligible error, relative to the largest weight

MakeLinear = Callable[[Tensor, Tensor | None], Linear]


class TorchLinear(Linear):
    """torch's own operator: for every device and type, and exported to ONNX."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape)
        self.weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self._bias)


class OneDnnLinear(Linear):
    """W in oneDNN's own layout: repacking W at each call doubles the time of a decode step."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        self._panels = panels_of(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._panels is not None and x.ndim == 2 and len(x) <= self._panels.few:
            return self._panels.multiply(x, self._bias, None)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self._panels is not None and x.ndim == 2 and len(x) <= self._panels.few:
            return self._panels.multiply(x, self._bias, residual)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out


class HalfLinear(Linear):
    """Float32 arithmetic with W kept as float16 (FBGEMM).

    Half the bytes to read, which bound a decode step.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape)
        # The bias is packed with the weight.
        self._packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, self._packed)
        return out


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest kind for this weight [out, in] on its device, exact but for rounding."""
    if weight.device.type != "cpu":
        return TorchLinear(weight, bias)
    if weight.dtype == torch.float32 and has_fbgemm() and is_half_exact(weight):
        return HalfLinear(weight, bias)
    return OneDnnLinear(weight, bias) if can_pack(weight.dtype) else TorchLinear(weight, bias)


def is_half_exact(weight: Tensor) -> bool:
    """Whether float16 can hold these float32 weights without a noticeable error.

    True for a checkpoint in float16; and for one in bfloat16, of which only weights below 2⁻¹⁷ are rounded,
    to multiples of 2⁻²⁴, unless that is more than `UNFELT` of the largest weight.
    """
    least, most = weight.aminmax()
    allowed = min(HALF_STEP / 2, float(torch.maximum(-least, most)) * UNFELT)
    parts = weight.split(4096)  # copies of a part, not of a whole output layer
    return all(bool((part - part.half().float()).abs().max() <= allowed) for part in parts)


class Dense(Format):
    name: ClassVar[str] = "dense"

    def __init__(self, make: MakeLinear = make_linear) -> None:
        self._make = make

    def check_device(self, device: torch.device) -> None:
        """Dense weights compute on every device."""

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        return True

    def column(
        self,
        checkpoint: Checkpoint,
        modules: Sequence[str],
        shards: Sequence[Shard],
        bias: Tensor | None,
    ) -> Linear:
        names = [f"{module}.weight" for module in modules]
        return self.pack(load_side_by_side(checkpoint, names, shards), bias)

    def row(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Linear:
        return self.pack(load_part(checkpoint, f"{module}.weight", columns=shard), None)

    def experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard, kernels: Kernels | None
    ) -> Experts:
        stored = StoredExperts(checkpoint, module, shard)
        if kernels is not None:
            gate_up, down = (_stack(read, shard.held) for read in (stored.gate_up, stored.down))
            return StackedExperts(gate_up, down, shard.held.start, kernels)
        return ListedExperts(self.expert_layers(stored, shard), shard.held.start)

    def expert_layers(self, stored: StoredExperts, shard: ExpertsShard) -> list[tuple[Linear, Linear]]:
        """(gate_up, down) of each expert that the rank holds."""
        return [
            (self.pack(stored.gate_up(number), None), self.pack(stored.down(number), None))
            for number in shard.held
        ]

    def dense(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Tensor:
        return load_part(checkpoint, f"{module}.weight", shard)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._make(weight, bias)


class StoredExperts:
    """The dense experts of a layer, one at a time, so that a layer is not in memory twice.

    A checkpoint has them one by one (`0.gate_proj.weight`, …), or all in two tensors `gate_up_proj` and
    `down_proj`: as `F.linear` takes them, which `save_pretrained` of transformers 5 writes, or each expert
    transposed, as many published checkpoints have them. The shapes of both tensors together tell which.

    Raises ValueError for shapes that are neither.
    """

    def __init__(self, checkpoint: Checkpoint, module: str, shard: ExpertsShard) -> None:
        self._checkpoint, self._module, self._shard = checkpoint, module, shard
        self._is_fused = not checkpoint.has_module(f"{module}.{shard.held.start}.gate_proj")
        self._is_transposed = self._is_fused and are_transposed(checkpoint, module, shard)

    def gate_up(self, expert: int) -> Tensor:
        """[2 · intermediate, hidden], gate first."""
        if not self._is_fused:
            names = [f"{self._module}.{expert}.{name}_proj.weight" for name in ("gate", "up")]
            return load_side_by_side(self._checkpoint, names, [self._shard.intermediate] * 2)
        return self._of_fused("gate_up_proj", expert, rows=self._shard.gate_up)

    def down(self, expert: int) -> Tensor:
        """[hidden, intermediate]"""
        columns = self._shard.intermediate
        if not self._is_fused:
            return load_part(self._checkpoint, f"{self._module}.{expert}.down_proj.weight", columns=columns)
        return self._of_fused("down_proj", expert, columns=columns)

    def _of_fused(self, name: str, expert: int, rows: Shard = WHOLE, columns: Shard = WHOLE) -> Tensor:
        name = f"{self._module}.{name}"
        if not self._is_transposed:
            return load_part(self._checkpoint, name, rows, columns, at=expert)
        return load_part(self._checkpoint, name, columns, rows, at=expert).t().contiguous()


def are_transposed(checkpoint: Checkpoint, module: str, shard: ExpertsShard) -> bool:
    """Whether experts in two tensors are stored transposed. Never ambiguous: no sizes make both square.

    Raises ValueError for shapes that are neither.
    """
    count, hidden, size = shard[:3]
    linear = (count, 2 * size, hidden), (count, hidden, size)
    transposed = (count, hidden, 2 * size), (count, size, hidden)
    found = tuple(checkpoint.shape(f"{module}.{name}") for name in FUSED)
    if found not in (linear, transposed):
        wanted = f"{linear} or {transposed}"
        raise ValueError(f"{', '.join(FUSED)} of {module} have shapes {found}, not {wanted}")
    return found == transposed


def _stack(read: Callable[[int], Tensor], numbers: range) -> Tensor:
    """Each matrix is put into place before the next is read: a layer's experts are not in memory twice."""
    first = read(numbers[0])
    stacked = first.new_empty(len(numbers), *first.shape)
    stacked[0] = first
    for place, number in enumerate(numbers[1:], 1):
        stacked[place] = read(number)
    return stacked


def load_side_by_side(checkpoint: Checkpoint, names: Sequence[str], shards: Sequence[Shard]) -> Tensor:
    """The rows of each tensor's shard, concatenated."""
    parts = [load_part(checkpoint, name, rows) for name, rows in zip(names, shards, strict=True)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def load_part(
    checkpoint: Checkpoint, name: str, rows: Shard = WHOLE, columns: Shard = WHOLE, at: int | None = None
) -> Tensor:
    """A rank's rows or columns of a tensor, as a copy in the model's type. One of the two must be `WHOLE`.

    `at`: of one of the matrices that the tensor stacks. Raises ValueError for a tensor of other sizes than
    the model's settings have.
    """
    assert WHOLE in (rows, columns), "no layer is cut both ways"
    for axis, shard in ((0, rows), (1, columns)):
        if shard.size:
            shard.check(checkpoint.shape(name)[axis + (at is not None)], f"axis {axis} of {name!r}")
    if columns == WHOLE:
        parts, axis, padding = [checkpoint.load(name, part, at=at) for part in rows.slices], 0, rows.padding
    else:
        loaded = [checkpoint.load(name, columns=part, at=at) for part in columns.slices]
        parts, axis, padding = loaded, 1, columns.padding
    if padding:
        shape = list(parts[0].shape)
        shape[axis] = padding
        parts.append(parts[0].new_zeros(shape))
    return torch.cat(parts, dim=axis) if len(parts) > 1 else parts[0]
