"""Small layers that the ViT and the LLM share. Weights are plain tensors; there is no training here."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x Wᵀ + b, W as [out, in].

    On the CPU W is kept in the layout that oneDNN computes in: repacking it at each call doubles the time of a decode step.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._is_packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), in one operation where there is one."""
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self.bias, "add")  # type: ignore[no-any-return]
        return residual + F.linear(x, self._weight, self.bias)


class QuantizedLinear:
    """y = x Wᵀ + b on the CPU with W in int8, one scale an output channel, and x in uint8, one scale a token.

    One scale a token, not one for all: so an outlier spoils nobody else's result, and no result depends on who stands beside.
    Unsigned with a zero point of 128, since signed activations take oneDNN's reference path, hundreds of times slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        largest = 127 if is_int8_exact() else 63
        wide = weight.float()
        self._scales = wide.abs().amax(dim=1).clamp(min=1e-8) / largest
        quantized = (wide / self._scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        self._bias = bias
        self._dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()  # in bfloat16 the sum below would round the largest activation over the edge
        scales = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).clamp_(min=1e-8)
        # 128 is the zero point, and the half rounds.
        quantized = torch.addcmul(_ZERO, x, 127.0 / scales).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, 128, self._weight, self._scales, self._zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(scales / 127.0)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(self._dtype)  # type: ignore[no-any-return]

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x)"""
        return residual + self(x)


_ZERO = torch.tensor(128.5)


@functools.cache
def is_int8_exact() -> bool:
    """Whether products of 8 bits are added exactly. Processors without VNNI add pairs of them in 16 bits, which can overflow."""
    ones = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((32, 64), 127, dtype=torch.int8), None)
    scales, zeros = torch.ones(32), torch.zeros(32, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(ones, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return bool((y == 255 * 127 * 64).all())


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN computes in the weight's type on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    """Rotary embedding of x [num_tokens, heads, head_dim], halves paired (Su et al. 2021), by what `rotary_tables` gave."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)
