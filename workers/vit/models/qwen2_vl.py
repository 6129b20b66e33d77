"""Qwen2-VL's tower: full attention in each frame, LayerNorm, QuickGELU. What depends on grids comes in as
inputs:

    patches      [num_patches, channels · temporal · patch²] float32
    cos and sin  [num_patches, 1, head_dim] float32

Pictures (frames of a video too) attend within themselves only. They come packed, in any sizes; or as a batch
of equal grids, with the same cos and sin for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import VisionInfo
from workers.nn.layers import LayerNorm, rotary_tables, rotate
from workers.nn.weights.base import Linear
from workers.nn.weights.weights import Weights
from workers.vit.models.base import (
    FRAMES,
    Axis,
    EncodeJob,
    Encoder,
    Inputs,
    InputSpec,
    Preparation,
    Tower,
)
from workers.vit.models.patches import patchify, rotary_angles
from workers.vit.models.segments import Attend, SegmentAttention, attend_in_batch
from workers.vit.pace import UNPACED, Pace

CHANNELS = 3
LAYER_NORM_EPS = 1e-6
PREFIX = "visual."


class VisionPreparation(Preparation):
    @property
    def specs(self) -> tuple[InputSpec, ...]:
        info = self.info
        patches = Axis("patches", most=1 << 20, multiple=info.merge_size**2)
        columns = CHANNELS * info.temporal_patch_size * info.patch_size**2
        angles = (patches, 1, info.embed_dim // info.num_heads)
        return (
            InputSpec("patches", torch.float32, (FRAMES, patches, columns)),
            InputSpec("cos", torch.float32, angles),
            InputSpec("sin", torch.float32, angles),
        )

    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        angles = torch.cat([rotary_angles(job.grid_thw, self.info) for job in jobs]).to(device)
        cos, sin = rotary_tables(angles, torch.float32)
        lengths = [job.grid_thw.h * job.grid_thw.w for job in jobs for _ in range(job.grid_thw.t)]
        return Inputs({"patches": patches, "cos": cos, "sin": sin}, {"frames": lengths})

    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        grid = jobs[0].grid_thw._replace(t=1)
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        cos, sin = rotary_tables(rotary_angles(grid, self.info).to(device), torch.float32)
        patches = patches.unflatten(0, (-1, grid.num_patches))
        return Inputs({"patches": patches.contiguous(), "cos": cos.contiguous(), "sin": sin.contiguous()}, {})


class VisionEncoder(Encoder):
    """Loads the tower under `visual.` of a checkpoint."""

    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        self.preparation = VisionPreparation(info)
        self.dtype, self.device = weights.dtype, weights.device
        tower = weights.under(PREFIX.rstrip("."))
        # The patches of a picture come as rows: the convolution is a matrix product.
        patch_embed = tower.tensor("patch_embed.proj.weight").flatten(1)
        self.patch_embed = tower.packed("patch_embed.proj", patch_embed)
        self.blocks = [_Block(info, tower.under(f"blocks.{index}")) for index in range(info.depth)]
        self.norm = _layer_norm(tower, "merger.ln_q")
        self.merger_in = tower.linear("merger.mlp.0")
        self.merger_out = tower.linear("merger.mlp.2")
        self._merged = info.merge_size**2

    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> Tensor:
        tensors = inputs.tensors
        x = self.patch_embed(tensors["patches"].to(self.dtype))  # […, num_patches, embed_dim]
        attend: Attend = attend_in_batch
        if inputs.lengths:
            attend = SegmentAttention(inputs.lengths["frames"], x.dtype, x.device, pace)
        for block in self.blocks:
            x = block(x, tensors["cos"], tensors["sin"], attend, pace)
            pace.after_layer()
        x = self.norm(x).unflatten(-2, (-1, self._merged)).flatten(-2)  # neighbouring patches side by side
        (embeddings,) = pace.rows(self._merge, flop_of(self.merger_in, self.merger_out), x)
        return embeddings

    def _merge(self, x: Tensor) -> tuple[Tensor]:
        return (self.merger_out(F.gelu(self.merger_in(x))),)


TOWER = Tower(VisionPreparation, VisionEncoder, PREFIX)


def flop_of(*layers: Linear) -> float:
    """Floating point operations of these layers for one row."""
    return sum(2.0 * layer.in_features * layer.out_features for layer in layers)


class _Block:
    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        self.num_heads = info.num_heads
        self.norm1 = _layer_norm(weights, "norm1")
        self.norm2 = _layer_norm(weights, "norm2")
        self.qkv = weights.linear("attn.qkv")
        self.proj = weights.linear("attn.proj")
        self.fc1 = weights.linear("mlp.fc1")
        self.fc2 = weights.linear("mlp.fc2")

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, pace: Pace) -> Tensor:
        q, k, v = pace.rows(self._qkv, flop_of(self.qkv), x, cos, sin)
        attended = attend(q, k, v).flatten(-2)
        flop = flop_of(self.proj, self.fc1, self.fc2)
        (out,) = pace.rows(self._after_attention, flop, x, attended)
        return out

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: each […, num_patches, heads, head_dim]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype), v

    def _after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        x = self.proj.add_to(x, attended)
        hidden = self.fc1(self.norm2(x))
        gate = (1.702 * hidden).sigmoid_()  # QuickGELU
        return (self.fc2.add_to(x, hidden.mul_(gate)),)


def _layer_norm(weights: Weights, name: str) -> LayerNorm:
    return LayerNorm(weights.tensor(f"{name}.weight"), weights.tensor(f"{name}.bias"), LAYER_NORM_EPS)
