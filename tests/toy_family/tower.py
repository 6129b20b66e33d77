"""The toy's tower: patches see the others of their frame; where a patch is comes in as an input of its own.

patches  [num_patches, 3 · patch²] float32
places   [num_patches, 2] float32: row and column, from 0 to 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.wire.base import GridTHW
from workers.nn.layers import RMSNorm
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
from workers.vit.models.patches import patchify
from workers.vit.models.segments import Attend, SegmentAttention, attend_in_batch
from workers.vit.pace import UNPACED, Pace

EPS = 1e-6
PREFIX = "eye."


class ToyPreparation(Preparation):
    @property
    def specs(self) -> tuple[InputSpec, ...]:
        patches = Axis("patches", most=1 << 20, multiple=self.info.merge_size**2)
        return (
            InputSpec("patches", torch.float32, (FRAMES, patches, 3 * self.info.patch_size**2)),
            InputSpec("places", torch.float32, (patches, 2)),
        )

    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        frames = [job.grid_thw._replace(t=1) for job in jobs for _ in range(job.grid_thw.t)]
        places = torch.cat([self._places(grid) for grid in frames]).to(device)
        return Inputs(
            {"patches": patches, "places": places}, {"frames": [grid.num_patches for grid in frames]}
        )

    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        grid = jobs[0].grid_thw._replace(t=1)
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        patches = patches.unflatten(0, (-1, grid.num_patches)).contiguous()
        return Inputs({"patches": patches, "places": self._places(grid).to(device)}, {})

    def _places(self, grid: GridTHW) -> Tensor:
        """Of one frame's patches, in their order: those of a token are side by side."""
        merge = self.info.merge_size
        rows = torch.arange(grid.h)[:, None].expand(grid.h, grid.w) / grid.h
        columns = torch.arange(grid.w)[None, :].expand(grid.h, grid.w) / grid.w
        blocks = (grid.h // merge, merge, grid.w // merge, merge)
        grouped = [x.reshape(blocks).transpose(1, 2).flatten() for x in (rows, columns)]
        return torch.stack(grouped, dim=1).contiguous()


class ToyEncoder(Encoder):
    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        self.preparation = ToyPreparation(info)
        self.dtype, self.device = weights.dtype, weights.device
        tower = weights.under(PREFIX.rstrip("."))
        self.look = tower.linear("look")
        self.place = tower.tensor("place.weight")  # [2, embed_dim]
        self.blocks = [_Block(info, tower.under(f"blocks.{number}")) for number in range(info.depth)]
        self.norm = RMSNorm(tower.tensor("norm.weight"), EPS)
        self.out = tower.linear("out")
        self._merged = info.merge_size**2

    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> Tensor:
        tensors = inputs.tensors
        x = self.look(tensors["patches"].to(self.dtype)) + tensors["places"].to(self.dtype) @ self.place
        attend: Attend = attend_in_batch
        if inputs.lengths:
            attend = SegmentAttention(inputs.lengths["frames"], x.dtype, x.device, pace)
        for block in self.blocks:
            x = block(x, attend, pace)
            pace.after_layer()
        return self.out(self.norm(x).unflatten(-2, (-1, self._merged)).flatten(-2))


TOWER = Tower(ToyPreparation, ToyEncoder, PREFIX)


class _Block:
    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        self._num_heads = info.num_heads
        self._norms = [RMSNorm(weights.tensor(f"norm{number}.weight"), EPS) for number in (1, 2)]
        self._qkv, self._proj = weights.linear("qkv"), weights.linear("proj")
        self._up, self._down = weights.linear("up"), weights.linear("down")

    def __call__(self, x: Tensor, attend: Attend, pace: Pace) -> Tensor:
        qkv = self._qkv(self._norms[0](x)).unflatten(-1, (3, self._num_heads, -1))
        x = x + self._proj(attend(*qkv.unbind(-3)).flatten(-2))
        (x,) = pace.rows(self._mlp, _flop_of(self._up, self._down), x)
        return x

    def _mlp(self, x: Tensor) -> tuple[Tensor]:
        return (x + self._down(F.relu(self._up(self._norms[1](x)))),)


def _flop_of(*layers: Linear) -> float:
    return sum(2.0 * layer.in_features * layer.out_features for layer in layers)
