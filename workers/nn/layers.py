"""Small layers that the ViT and the LLM share. Weights are plain tensors; there is no training here."""

from __future__ import annotations

import functools
import platform
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x Wᵀ + b, W as [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight: Any = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), in one operation where there is one."""
        return residual + self(x)


class OneDnnLinear(Linear):
    """W in the layout that oneDNN computes in: repacking it at each call doubles the time of a decode
    step."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")  # type: ignore[no-any-return]


class HalfLinear(Linear):
    """Float32 arithmetic with W kept as float16 (FBGEMM): half the bytes to read, which is what a decode step
    waits for."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight)  # the bias is packed with it
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16.default(x, self._weight)  # type: ignore[no-any-return]


class Int8Linear(Linear):
    """W in int8, one scale an output channel, and x in uint8, one scale a token (oneDNN).

    One scale a token, not one for all: so an outlier spoils nobody else's result, and no result depends on
    who stands beside. Unsigned with a zero point of 128, since signed activations take oneDNN's reference
    path, hundreds of times slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._dtype = weight.dtype
        largest = 127 if is_int8_exact() else 63
        wide = weight.float()
        self._scales = wide.abs().amax(dim=1).clamp(min=1e-8) / largest
        self._zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        self._weight = self._pack((wide / self._scales[:, None]).round().to(torch.int8))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()  # in bfloat16 the sum below would round the largest activation over the edge
        largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).clamp_(min=1e-8)
        y = self._multiply(x, largest).mul_(largest)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(self._dtype)

    def _pack(self, weight: Tensor) -> Any:
        return torch.ops.onednn.qlinear_prepack(weight, None)

    def _multiply(self, x: Tensor, largest: Tensor) -> Tensor:
        """(x / largest) Wᵀ, in 8 bits; `largest` [num_tokens, 1] is the largest absolute value of each
        token."""
        quantized = torch.addcmul(_ZERO_POINT, x, 127.0 / largest).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
            quantized,
            1 / 127,
            128,
            self._weight,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )


class FbgemmInt8Linear(Int8Linear):
    """The same through FBGEMM, twice as fast as oneDNN on processors without VNNI."""

    def _pack(self, weight: Tensor) -> Any:
        with warnings.catch_warnings():
            # quantized tensors are deprecated, the operators that take them are not
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(
                weight, self._scales.double(), self._zero_points, 0
            )
            return torch.ops.quantized.linear_prepack(quantized, None)

    def _multiply(self, x: Tensor, largest: Tensor) -> Tensor:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        out: Tensor = multiply(x / largest, 1 / 127, 128, self._weight)
        return out


_ZERO_POINT = torch.tensor(128.5)  # and the half that rounds
HALF_STEP = 2.0**-24  # the smallest number that float16 has; every number near 0 is a multiple
UNFELT = 2.0**-20  # an error of so much of the largest weight


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest kind for this weight [out, in] on its device, exact but for rounding."""
    if weight.device.type != "cpu":
        return Linear(weight, bias)
    if weight.dtype == torch.float32 and has_fbgemm() and is_half_exact(weight):
        return HalfLinear(weight, bias)
    return OneDnnLinear(weight, bias) if can_pack(weight) else Linear(weight, bias)


def make_int8_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    return (
        FbgemmInt8Linear(weight, bias) if has_fbgemm() and not is_int8_exact() else Int8Linear(weight, bias)
    )


def is_half_exact(weight: Tensor) -> bool:
    """Whether float16 holds these float32 weights: those of a checkpoint in float16, or in bfloat16, of which
    it rounds only what is below 2⁻¹⁷, to the nearest multiple of 2⁻²⁴. Not if the largest weight is so small
    that this would be felt.
    """
    least, most = weight.aminmax()
    allowed = min(HALF_STEP / 2, float(torch.maximum(-least, most)) * UNFELT)
    parts = weight.split(4096)  # copies of a part, not of a whole output layer
    return all(bool((part - part.half().float()).abs().max() <= allowed) for part in parts)


@functools.cache
def has_fbgemm() -> bool:
    # torch 2.11 names "x86" as its engine on ARM, too.
    return (
        is_x86()
        and torch.backends.quantized.engine in ("x86", "fbgemm")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
    )


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


@functools.cache
def is_int8_exact() -> bool:
    """Whether products of 8 bits are added exactly.

    Processors without VNNI add pairs of them in 16 bits, which can overflow.
    """
    ones = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((32, 64), 127, dtype=torch.int8), None)
    scales, zeros = torch.ones(32), torch.zeros(32, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(
        ones, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y == 255 * 127 * 64).all())


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN computes in the weight's type on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class LayerNorm:
    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm:
    """Root-mean-square norm, computed in float32 whatever the type of the activations."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [num_tokens, 1, head_dim] for `rotate`, of angles [num_tokens, head_dim / 2]."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype)[:, None], torch.cat((-sin, sin), dim=-1).to(dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [num_tokens, heads, head_dim], halves paired (Su et al.

    2021), by what `rotary_tables` gave.
    """
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)
