"""Windows beside a loop over each of them, on grids whose sides are mostly no multiple of a window's."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import MAX_ASPECT_RATIO, AreaLimits, ImageSize
from pipeline.families.qwen2_5_vl import WindowedVisionInfo
from pipeline.families.resizing import smart_resize
from pipeline.wire.base import GridTHW
from tests.workers.vit.tiny_towers import GRIDS, MERGE, SIZES, make_jobs
from workers.vit.models.qwen2_5_vl import (
    WindowedPreparation,
    attention_in_windows,
    most_windows,
    window_order,
)
from workers.vit.models.segments import SegmentAttention
from workers.vit.pace import UNPACED

CPU = torch.device("cpu")
MERGED = MERGE**2


def naive_windows(height: int, width: int, side: int) -> list[list[int]]:
    """The tokens of each window."""
    tokens = torch.arange(height * width).view(height, width)
    starts = itertools.product(range(0, height, side), range(0, width, side))
    return [tokens[row : row + side, column : column + side].flatten().tolist() for row, column in starts]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, grid: GridTHW, side: int) -> Tensor:
    """Of one frame [num_patches, heads, head_dim], window by window."""
    out = torch.full_like(q, torch.nan)
    for tokens in naive_windows(grid.h // MERGE, grid.w // MERGE, side):
        patches = (torch.tensor(tokens)[:, None] * MERGED + torch.arange(MERGED)).flatten()
        heads = (x[patches].transpose(0, 1) for x in (q, k, v))
        out[patches] = F.scaled_dot_product_attention(*heads).transpose(0, 1)
    return out


def preparation_for(side: int) -> WindowedPreparation:
    return WindowedPreparation(
        WindowedVisionInfo(**SIZES, embedding_width=8, window_size=side, full_attention_layers=())
    )


@pytest.mark.parametrize("side", range(1, 6))
def test_a_frames_tokens_come_in_the_order_of_its_windows(side: int) -> None:
    for height, width in itertools.product((1, 2, 3, 4, 5, 7, 8, 9), (1, 3, 4, 6, 9, 11)):
        order = window_order(height, width, side)
        found = [part.tolist() for part in order.tokens.split(order.sizes)]
        assert sorted(found) == sorted(naive_windows(height, width, side))
        assert sorted(order.sizes, reverse=True) == list(order.sizes), "one size is one call"
        assert len({tuple(sorted(part)) for part in found}) == len(found)


@pytest.mark.parametrize("side", range(1, 6))
def test_attention_within_windows_is_that_of_a_loop_over_them(side: int) -> None:
    preparation, generator = preparation_for(side), torch.Generator().manual_seed(side)
    for job in make_jobs(preparation.info, GRIDS):
        frame = job.grid_thw._replace(t=1)
        q, k, v = (torch.randn(job.grid_thw.t, frame.num_patches, 3, 8, generator=generator) for _ in "qkv")
        expected = torch.stack([naive_attention(*part, frame, side) for part in zip(q, k, v, strict=True)])
        batch = preparation.batch([job], CPU).tensors
        found = attention_in_windows(batch["windows"], batch["places"])(q, k, v)
        torch.testing.assert_close(found, expected)

        tensors, lengths = preparation.packed([job], CPU)
        rows = (tensors["tokens"][:, None] * MERGED + torch.arange(MERGED)).flatten()
        into_windows = rows.argsort()
        attend = SegmentAttention(lengths["windows"], torch.float32, CPU, UNPACED)
        found = attend(*(x.flatten(0, 1)[into_windows] for x in (q, k, v)))[rows]
        torch.testing.assert_close(found, expected.flatten(0, 1))


def test_no_picture_has_more_windows_than_engines_are_built_for() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        long = rng.randint(28, 20_000)
        short = rng.randint(max(28, -(-long // MAX_ASPECT_RATIO)), max(28, long))
        most = rng.choice((28 * 28, 100_000, 1_000_000, 12_845_056))
        size = smart_resize(ImageSize(short, long), 28, AreaLimits(min(3136, most), most))
        height, width = (pixels // 28 for pixels in size)
        for side in (1, 4, 5):
            num_windows = -(-height // side) * -(-width // side)
            assert num_windows <= most_windows(height * width, side), (size, side)


def test_flop_of_windows_grows_with_the_picture_and_of_full_attention_with_its_square() -> None:
    info = preparation_for(4).info
    full = WindowedPreparation(
        WindowedVisionInfo(**SIZES, embedding_width=8, window_size=4, full_attention_layers=(0, 1, 2))
    )
    windowed = WindowedPreparation(info)
    assert windowed.flop(64) == full.flop(64), "one window"
    assert windowed.flop(6400) == 100 * windowed.flop(64)
    assert full.flop(6400) > 100 * full.flop(64)
