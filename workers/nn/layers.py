"""Small layers that the ViT and the LLM share. Weights are plain tensors, for inference only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import operators


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of […, 2 · size], gate first."""
    if operators.takes(gate_up):
        return operators.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class LayerNorm:
    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm:
    """Root-mean-square norm, computed in float32 whatever the type of the activations.

    The weight is of their type, or in float32 where its rounding would count.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        has_kernel = self.weight.dtype in (x.dtype, torch.float32)
        if has_kernel and operators.takes(x) and operators.takes(self.weight):
            return operators.rms_norm(x, self.weight, self.eps)
        if x.dtype != self.weight.dtype:
            return self(x.to(self.weight.dtype)).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [num_tokens, 1, head_dim] for `rotate`, of angles [num_tokens, head_dim / 2]."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype)[:, None], torch.cat((-sin, sin), dim=-1).to(dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [num_tokens, heads, head_dim], with the tables of `rotary_tables`.

    Halves are paired (Su et al. 2021).
    """
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)
