"""Small layers that the ViT and the LLM share. Weights are plain tensors; there is no training here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_FOR_ROWS = 1  # oneDNN lays weights out for so many rows: decode is what waits for memory


class Linear:
    """y = x Wᵀ + b, W as [out, in].

    On the CPU W is kept in the layout that oneDNN computes in: repacking it at each call doubles the time of a decode step.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._is_packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) if self._is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), in one operation where there is one."""
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self.bias, "add")  # type: ignore[no-any-return]
        return residual + F.linear(x, self._weight, self.bias)


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
