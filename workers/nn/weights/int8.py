"""Weights and activations in 8 bits, quantised at load from a dense checkpoint. On the CPU.

All linear layers of the decoder are quantised, its output layer and its experts included; routers are not.
So are those of a tower's blocks and mergers; its embedding of patches is not.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.native import operators
from workers.nn.native.quantized_panels import QuantizedPanels, pack_int8, quantized_kernels
from workers.nn.weights.base import Activations, Experts, Linear
from workers.nn.weights.dense import Dense, MakeLinear
from workers.nn.weights.processor import has_fbgemm, is_int8_exact
from workers.nn.weights.shard import ExpertsShard

ROWS = 4096  # that are quantised at a time
_ZERO_POINT = torch.tensor(128.5)  # 128, and 0.5 to round


class PanelLinear(Linear):
    """W in 8 or 4 bits, and x in 8, one scale per token, by kernels of ours."""

    def __init__(self, panels: QuantizedPanels, bias: Tensor | None = None) -> None:
        super().__init__(panels.out_features, panels.in_features)
        self._panels, self._bias = panels, bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._panels.multiply(x, self._bias, None)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._panels.multiply(x, self._bias, residual)


class Int8Linear(Linear):
    """W in int8, one scale per output channel, and x in uint8, one scale per token (oneDNN).

    With one scale per token an outlier affects no other token. Unsigned with a zero point of 128, since
    signed activations take oneDNN's reference path, hundreds of times slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape)
        self._bias, self._dtype = bias, weight.dtype
        largest = 127 if is_int8_exact() else 63
        self._scales = torch.empty(self.out_features)
        self._zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        packed = torch.empty(weight.shape, dtype=torch.int8)
        # An output layer in float32, whole and several times, would be more than all other weights.
        parts = zip(weight.split(ROWS), self._scales.split(ROWS), packed.split(ROWS), strict=True)
        for part, scales, out in parts:
            wide = part.float()
            torch.div(wide.abs().amax(dim=1).clamp_(min=1e-8), largest, out=scales)
            out.copy_((wide / scales[:, None]).round_())
        self._pack(packed)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()  # in bfloat16 the sum below could round the largest activation up, beyond 255
        largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).clamp_(min=1e-8)
        y = self._multiply(x, largest).mul_(largest)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(self._dtype)

    def _pack(self, weight: Tensor) -> None:
        self._weight: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)

    def _multiply(self, x: Tensor, largest: Tensor) -> Tensor:
        """(x / largest) Wᵀ in 8 bits. `largest` [num_tokens, 1] is the largest value of each token."""
        quantized = torch.addcmul(_ZERO_POINT, x, 127.0 / largest).to(torch.uint8)
        scales, zeros = self._scales, self._zero_points
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized,
            1 / 127,
            128,
            self._weight,
            scales,
            zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out


class FbgemmInt8Linear(Int8Linear):
    """`Int8Linear` by FBGEMM, twice as fast as oneDNN on processors without VNNI."""

    def _pack(self, weight: Tensor) -> None:
        with warnings.catch_warnings():
            # Quantized tensors are deprecated, the operators that take them are not.
            warnings.simplefilter("ignore", UserWarning)
            scales, zeros = self._scales.double(), self._zero_points
            quantized = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
            self._packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantized, None)

    def _multiply(self, x: Tensor, largest: Tensor) -> Tensor:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        out: Tensor = multiply(x / largest, 1 / 127, 128, self._packed)
        return out


def make_int8_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest kind on this processor."""
    if quantized_kernels() and weight.dtype in operators.IS_HALF:
        return PanelLinear(pack_int8(weight), bias)
    kind = FbgemmInt8Linear if has_fbgemm() and not is_int8_exact() else Int8Linear
    return kind(weight, bias)


class Int8(Dense):
    """Reads and shards the checkpoint's tensors like dense ones."""

    name: ClassVar[str] = "int8"

    def __init__(self, make: MakeLinear = make_int8_linear) -> None:
        super().__init__(make)

    def experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard, kernels: Kernels | None
    ) -> Experts:
        """The decoder's kernels are for dense weights."""
        return super().experts(checkpoint, module, shard, None)

    def choose_activations(self, activations: Activations) -> None:
        """They are in 8 bits always; where they are not to be, the registry takes another layout."""
        assert activations is not Activations.NONE

    def check_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(
                f"quantization {self.name!r} is for the CPU, but this worker computes on {device}"
            )
