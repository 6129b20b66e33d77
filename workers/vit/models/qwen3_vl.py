"""Qwen3-VL's tower: full attention in each frame, learned positions beside the rotary ones, and deepstack:
the outputs of some layers become further columns of an embedding.

The table of positions is square, and interpolated to the grid of a frame:

    position_taps     [num_patches, 4] int64: rows of the table
    position_weights  [num_patches, 4] float32
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.families.qwen3_vl import Qwen3VisionInfo
from pipeline.wire.base import GridTHW
from workers.nn.native import operators
from workers.nn.weights.weights import Weights
from workers.vit.models.base import EncodeJob, Encoder, Inputs, InputSpec, Tower
from workers.vit.models.layers import PREFIX, Block, Merger, PlainMlp, embed_patches, layer_norm, patch_embed
from workers.vit.models.patches import PatchPreparation, frames_of, patch_places
from workers.vit.models.segments import attention
from workers.vit.pace import UNPACED, Pace

NUM_TAPS = 4


class Taps(NamedTuple):
    """The rows of the table that make the position of each patch."""

    rows: Tensor  # [num_patches, 4] int64
    weights: Tensor  # [num_patches, 4] float32


@functools.lru_cache(16)
def position_taps(height: int, width: int, merge: int, side: int) -> Taps:
    """Bilinear interpolation of a table of side · side to height · width patches, corner on corner."""
    rows, columns = patch_places(GridTHW(1, height, width), merge)
    (upper, lower, down), (left, right, across) = _between(rows, height, side), _between(columns, width, side)
    taps = [row * side + column for row in (upper, lower) for column in (left, right)]
    weights = [row * column for row in (1 - down, down) for column in (1 - across, across)]
    return Taps(torch.stack(taps, dim=1), torch.stack(weights, dim=1))


def _between(places: Tensor, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The neighbours in the table of each place on a side of this size, and how far it is from the first."""
    source = places.float() * (side - 1) / max(size - 1, 1)
    first = source.floor()
    return first.long(), (first.long() + 1).clamp(max=side - 1), source - first


class PositionedPreparation(PatchPreparation):
    info: Qwen3VisionInfo

    def __init__(self, info: VisionInfo) -> None:
        assert isinstance(info, Qwen3VisionInfo)
        super().__init__(info)

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        return (
            *super().specs,
            InputSpec("position_taps", torch.int64, (self.patches, NUM_TAPS)),
            InputSpec("position_weights", torch.float32, (self.patches, NUM_TAPS)),
        )

    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        inputs = super().packed(jobs, device)
        return Inputs({**inputs.tensors, **self._positions(frames_of(jobs), device)}, inputs.lengths)

    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        tensors = super().batch(jobs, device).tensors
        return Inputs({**tensors, **self._positions([jobs[0].grid_thw], device)}, {})

    def _positions(self, frames: Sequence[GridTHW], device: torch.device) -> dict[str, Tensor]:
        merge, side = self.info.merge_size, self.info.position_side
        taps = [position_taps(grid.h, grid.w, merge, side) for grid in frames]
        rows, weights = (torch.cat(parts).to(device) for parts in zip(*taps, strict=True))
        return {"position_taps": rows, "position_weights": weights}


class PositionedEncoder(Encoder):
    """Loads the tower under `visual.` of a checkpoint."""

    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        assert isinstance(info, Qwen3VisionInfo)
        self.preparation = PositionedPreparation(info)
        self.dtype, self.device = weights.dtype, weights.device
        tower = weights.under(PREFIX.rstrip("."))
        self.patch_embed = patch_embed(tower, tower.tensor("patch_embed.proj.bias"))
        self.positions = tower.tensor("pos_embed.weight")  # [position_side², embed_dim]
        self.blocks = [_block(info, tower.under(f"blocks.{index}")) for index in range(info.depth)]
        self.merger = _merger(info, tower.under("merger"), is_norm_of_token=False)
        self.deepstack = {
            layer: _merger(info, tower.under(f"deepstack_merger_list.{index}"), is_norm_of_token=True)
            for index, layer in enumerate(info.deepstack_layers)
        }

    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> Tensor:
        tensors = inputs.tensors
        x = embed_patches(self.patch_embed, tensors["patches"], self.dtype, pace)
        flop = 2.0 * NUM_TAPS * x.shape[-1]
        taps = tensors["position_taps"], tensors["position_weights"]
        (positions,) = pace.rows(self._interpolate, flop, *taps)
        x = x + positions
        attend = attention(inputs.lengths.get("frames"), x, pace)
        features: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x = block(x, tensors["cos"], tensors["sin"], attend, pace)
            if layer in self.deepstack:
                features.append(self.deepstack[layer](x, pace))
            pace.after_layer()
        return torch.cat([self.merger(x, pace), *features], dim=-1)

    def _interpolate(self, taps: Tensor, weights: Tensor) -> tuple[Tensor]:
        """Positions [num_patches, embed_dim], summed in float32."""
        parts = [
            self.positions[taps[:, index]].float() * weights[:, index, None] for index in range(NUM_TAPS)
        ]
        return (sum(parts[1:], parts[0]).to(self.dtype),)


TOWER = Tower(PositionedPreparation, PositionedEncoder, PREFIX)


def _block(info: Qwen3VisionInfo, weights: Weights) -> Block:
    mlp = weights.under("mlp")
    return Block(
        info, weights, layer_norm, PlainMlp(mlp.linear("linear_fc1"), mlp.linear("linear_fc2"), _gelu)
    )


def _gelu(x: Tensor) -> Tensor:
    return operators.gelu_tanh_(x) if operators.takes(x) else F.gelu(x, approximate="tanh")


def _merger(info: Qwen3VisionInfo, weights: Weights, is_norm_of_token: bool) -> Merger:
    first, second = weights.linear("linear_fc1"), weights.linear("linear_fc2")
    return Merger(info, layer_norm(weights, "norm"), first, second, is_norm_of_token)
