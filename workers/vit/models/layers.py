"""Layers that towers share: attention with an MLP after it, and mergers of neighbouring patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import VisionInfo
from workers.nn.layers import LayerNorm, RMSNorm, rotate, silu_mul
from workers.nn.native import operators
from workers.nn.weights.base import Linear
from workers.nn.weights.shard import WHOLE
from workers.nn.weights.weights import Weights
from workers.vit.models.segments import Attend
from workers.vit.pace import Pace

PREFIX = "visual."
NORM_EPS = 1e-6

Norm = Callable[[Tensor], Tensor]


def flop_of(*layers: Linear) -> float:
    """Floating point operations of these layers for one row."""
    return sum(2.0 * layer.in_features * layer.out_features for layer in layers)


def layer_norm(weights: Weights, name: str) -> Norm:
    return LayerNorm(weights.tensor(f"{name}.weight"), weights.tensor(f"{name}.bias"), NORM_EPS)


def rms_norm(weights: Weights, name: str) -> Norm:
    return RMSNorm(weights.tensor(f"{name}.weight"), NORM_EPS)


def patch_embed(tower: Weights, bias: Tensor | None = None) -> Linear:
    """The patches of a picture come as rows: the convolution is a matrix product.

    Never quantised: its input is the picture itself, and it is less than a hundredth of a tower.
    """
    return tower.unquantized(tower.tensor("patch_embed.proj.weight").flatten(1), bias)


def embed_patches(layer: Linear, patches: Tensor, dtype: torch.dtype, pace: Pace) -> Tensor:
    """[…, num_patches, embed_dim] of patches in float32"""
    (x,) = pace.rows(lambda some: (layer(some.to(dtype)),), flop_of(layer), patches)
    return x


class TowerMlp(ABC):
    flop: float  # for one row

    @abstractmethod
    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the MLP of x"""


class PlainMlp(TowerMlp):
    """`activate` may overwrite its argument."""

    def __init__(self, first: Linear, second: Linear, activate: Callable[[Tensor], Tensor]) -> None:
        self._first, self._second, self._activate = first, second, activate
        self.flop = flop_of(first, second)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._second.add_to(residual, self._activate(self._first(x)))


class GatedMlp(TowerMlp):
    """SwiGLU with biases."""

    def __init__(self, weights: Weights) -> None:
        gate_up, whole = ("gate_proj", "up_proj"), (WHOLE, WHOLE)
        self._gate_up = weights.column(gate_up, whole, weights.bias(gate_up, whole))
        self._down = weights.linear("down_proj")
        self.flop = flop_of(self._gate_up, self._down)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._down.add_to(residual, silu_mul(self._gate_up(x)))


class Block:
    """A layer of the tower: attention and `mlp`, each behind a norm."""

    def __init__(
        self, info: VisionInfo, weights: Weights, norm: Callable[[Weights, str], Norm], mlp: TowerMlp
    ) -> None:  # fmt: skip
        self._num_heads, self._mlp = info.num_heads, mlp
        self._norm1, self._norm2 = norm(weights, "norm1"), norm(weights, "norm2")
        self._qkv, self._proj = weights.linear("attn.qkv"), weights.linear("attn.proj")

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, pace: Pace) -> Tensor:
        q, k, v = pace.rows(self._rotated, flop_of(self._qkv), x, cos, sin)
        attended = attend(q, k, v).flatten(-2)
        (out,) = pace.rows(self._after_attention, flop_of(self._proj) + self._mlp.flop, x, attended)
        return out

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: each […, num_patches, heads, head_dim]."""
        qkv = self._qkv(self._norm1(x))
        if qkv.ndim == 2 and operators.takes(qkv) and operators.takes(cos, sin):
            return operators.split_rotated(qkv, cos, sin, self._num_heads)
        q, k, v = qkv.unflatten(-1, (3, self._num_heads, -1)).unbind(-3)
        return rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype), v

    def _after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        x = self._proj.add_to(x, attended)
        return (self._mlp.add_to(x, self._norm2(x)),)


class Merger:
    """One token of the neighbouring patches, which are side by side: a norm of each patch, or with
    `is_norm_of_token` one of all of them together; then an MLP."""

    def __init__(
        self, info: VisionInfo, norm: Norm, first: Linear, second: Linear, is_norm_of_token: bool = False
    ) -> None:  # fmt: skip
        self._norm, self._first, self._second = norm, first, second
        self._merged, self._is_norm_of_token = info.merge_size**2, is_norm_of_token

    def __call__(self, x: Tensor, pace: Pace) -> Tensor:
        """[…, num_tokens, width] of x […, num_patches, embed_dim]"""
        tokens = x.unflatten(-2, (-1, self._merged))
        (merged,) = pace.rows(self._merge, flop_of(self._first, self._second), tokens)
        return merged

    def _merge(self, tokens: Tensor) -> tuple[Tensor]:
        x = self._norm(tokens.flatten(-2)) if self._is_norm_of_token else self._norm(tokens).flatten(-2)
        return (self._second(F.gelu(self._first(x))),)
