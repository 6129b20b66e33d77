"""Patches of pixels, and their rotary angles: the same in all of Qwen's towers.

Patches are ordered by time, block row, block column, row in the block, column in the block, so that the
patches of one merged token are adjacent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.wire.base import GridTHW
from workers.nn.layers import rotary_tables
from workers.vit.models.base import FRAMES, PATCHES, Axis, EncodeJob, Inputs, InputSpec, Preparation

CHANNELS = 3
ROPE_THETA = 10_000.0


class PatchPreparation(Preparation):
    """What depends on grids comes in as inputs:

        patches      [num_patches, channels · temporal · patch²] float32
        cos and sin  [num_patches, 1, head_dim] float32

    Pictures (frames of a video too) come packed, in any sizes; or as a batch of equal grids, with the same
    cos and sin for all of them.
    """

    @property
    def patches(self) -> Axis:
        return Axis(PATCHES, most=1 << 20, multiple=self.info.merge_size**2)

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        info = self.info
        columns = CHANNELS * info.temporal_patch_size * info.patch_size**2
        angles = (self.patches, 1, info.embed_dim // info.num_heads)
        return (
            InputSpec("patches", torch.float32, (FRAMES, self.patches, columns)),
            InputSpec("cos", torch.float32, angles),
            InputSpec("sin", torch.float32, angles),
        )

    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        angles = torch.cat([rotary_angles(job.grid_thw, self.info) for job in jobs]).to(device)
        cos, sin = rotary_tables(angles, torch.float32)
        lengths = [grid.num_patches for grid in frames_of(jobs)]
        return Inputs({"patches": patches, "cos": cos, "sin": sin}, {"frames": lengths})

    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        grid = jobs[0].grid_thw._replace(t=1)
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        cos, sin = rotary_tables(rotary_angles(grid, self.info).to(device), torch.float32)
        patches = patches.unflatten(0, (-1, grid.num_patches))
        return Inputs({"patches": patches.contiguous(), "cos": cos.contiguous(), "sin": sin.contiguous()}, {})


def frames_of(jobs: Sequence[EncodeJob]) -> list[GridTHW]:
    """The grid of each frame, in the order of packed rows."""
    return [job.grid_thw._replace(t=1) for job in jobs for _ in range(job.grid_thw.t)]


def patchify(pixels: Tensor, info: VisionInfo) -> Tensor:
    """Normalised patches [num_patches, channels · temporal · patch²] float32 of uint8 pixels
    [frames, height, width, 3].

    The last frame is repeated to fill a temporal patch, a single picture too.
    """
    mean = torch.tensor(info.image_mean, device=pixels.device)
    std = torch.tensor(info.image_std, device=pixels.device)
    x = (pixels.float() / 255 - mean) / std
    if missing := -len(x) % info.temporal_patch_size:
        x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
    frames, height, width, channels = x.shape
    patch, merge, temporal = info.patch_size, info.merge_size, info.temporal_patch_size
    rows, columns = height // info.factor, width // info.factor
    x = x.view(frames // temporal, temporal, rows, merge, patch, columns, merge, patch, channels)
    # time, rows, columns, merge rows, merge columns, channel, temporal, patch, patch
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(-1, channels * temporal * patch * patch)


def rotary_angles(grid: GridTHW, info: VisionInfo) -> Tensor:
    """Angles [num_patches, head_dim / 2] float32 of the patches' rows and columns."""
    quarter = info.embed_dim // info.num_heads // 2
    steps = torch.arange(0, quarter, 2, dtype=torch.float32) / quarter
    frequencies = 1.0 / (ROPE_THETA**steps)
    places = patch_places(grid, info.merge_size)
    return torch.cat([x[:, None].float() * frequencies for x in places], dim=-1).repeat(grid.t, 1)


def patch_places(grid: GridTHW, merge: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, each [num_patches] int64, of one frame's patches in their order."""
    rows = torch.arange(grid.h)[:, None].expand(grid.h, grid.w)
    columns = torch.arange(grid.w)[None, :].expand(grid.h, grid.w)
    blocks = (grid.h // merge, merge, grid.w // merge, merge)
    rows, columns = (x.reshape(blocks).transpose(1, 2).flatten() for x in (rows, columns))
    return rows, columns
