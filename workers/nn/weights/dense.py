"""Dense weights, in the model's type. Layers that no other format holds are dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import FILE_DTYPES, Checkpoint
from workers.nn.native import half_rows
from workers.nn.native.panels import panels_of
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.experts import ListedExperts, StackedExperts
from workers.nn.weights.parts import load_as_stored, load_part, load_side_by_side
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


class SixteenBitLinear(Linear):
    """Float32 arithmetic with W [out, in] as its file has it, in bfloat16 or float16: exact, and nothing is
    packed at load, which takes FBGEMM some 10 ns a weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape)
        self.weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return half_rows.multiply(self.weight, x, self._bias, None)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return half_rows.multiply(self.weight, x, self._bias, residual)


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
        if self._stays(checkpoint, names):
            return SixteenBitLinear(load_as_stored(checkpoint, names, shards), bias)
        return self.pack(load_side_by_side(checkpoint, names, shards), bias)

    def row(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Linear:
        name = f"{module}.weight"
        if self._stays(checkpoint, [name]):
            return SixteenBitLinear(load_as_stored(checkpoint, [name], [WHOLE], shard))
        return self.pack(load_part(checkpoint, name, columns=shard), None)

    def tied(self, checkpoint: Checkpoint, name: str, shard: Shard) -> Linear:
        if self._stays(checkpoint, [name]):
            return SixteenBitLinear(load_as_stored(checkpoint, [name], [shard]))
        return self.pack(load_part(checkpoint, name, shard), None)

    def _stays(self, checkpoint: Checkpoint, names: Sequence[str]) -> bool:
        """Whether these matrices, side by side, are computed as the file has them."""
        types = {checkpoint.type_of(name) for name in names}
        return (
            self._make is make_linear
            and checkpoint.device.type == "cpu"
            and checkpoint.dtype is torch.float32
            and len(types) == 1
            and FILE_DTYPES.get(types.pop()) in half_rows.IS_BF16
            and all(len(checkpoint.shape(name)) == 2 for name in names)
            and half_rows.has_kernel()
        )

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

    Raises ValueError for shapes that are neither, and for experts of another hidden size than the model.
    """

    def __init__(self, checkpoint: Checkpoint, module: str, shard: ExpertsShard) -> None:
        self._checkpoint, self._module, self._shard = checkpoint, module, shard
        self._is_fused = not checkpoint.has_module(f"{module}.{shard.held.start}.gate_proj")
        self._is_transposed = self._is_fused and are_transposed(checkpoint, module, shard)

    def gate_up(self, expert: int) -> Tensor:
        """[2 · intermediate, hidden], gate first."""
        if not self._is_fused:
            names = [f"{self._module}.{expert}.{name}_proj.weight" for name in ("gate", "up")]
            made = load_side_by_side(self._checkpoint, names, [self._shard.intermediate] * 2)
            self._shard.check_hidden(made.shape[1], names[0])
            return made
        return self._of_fused("gate_up_proj", expert, rows=self._shard.gate_up)

    def down(self, expert: int) -> Tensor:
        """[hidden, intermediate]"""
        columns = self._shard.intermediate
        if not self._is_fused:
            name = f"{self._module}.{expert}.down_proj.weight"
            made = load_part(self._checkpoint, name, columns=columns)
            self._shard.check_hidden(len(made), name)
            return made
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
