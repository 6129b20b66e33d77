"""Patches of pixels, and their rotary angles: the same in all of Qwen's towers.

Patches are ordered by time, block row, block column, row in the block, column in the block, so that the
patches of one merged token are adjacent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.wire.base import GridTHW

ROPE_THETA = 10_000.0


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
    merge = info.merge_size
    rows = torch.arange(grid.h)[:, None].expand(grid.h, grid.w)
    columns = torch.arange(grid.w)[None, :].expand(grid.h, grid.w)
    blocks = (grid.h // merge, merge, grid.w // merge, merge)
    grouped = [x.reshape(blocks).transpose(1, 2).flatten().repeat(grid.t) for x in (rows, columns)]
    quarter = info.embed_dim // info.num_heads // 2
    steps = torch.arange(0, quarter, 2, dtype=torch.float32) / quarter
    frequencies = 1.0 / (ROPE_THETA**steps)
    return torch.cat([x[:, None].float() * frequencies for x in grouped], dim=-1)
