"""Forwards in blocks: the same embeddings, and a sign of life after a bounded amount of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.wire.base import GridTHW
from workers.nn.weights.registry import open_weights
from workers.vit.blocks import Blocks
from workers.vit.engines import torch as module
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.qwen2_vl import VisionEncoder

CPU = torch.device("cpu")
GRIDS = [GridTHW(1, 4, 6), GridTHW(1, 24, 18), GridTHW(3, 2, 8)]


def engine_of(folder: Path, after_work: Any = None) -> TorchEngine:
    info = read_model_info(folder).vision
    return TorchEngine(VisionEncoder(info, open_weights(folder, torch.float32, CPU)), after_work=after_work)


def jobs(engine: TorchEngine) -> list[EncodeJob]:
    generator = torch.Generator().manual_seed(3)
    made, info = [], engine.encoder.preparation.info
    for grid in GRIDS:
        patch, frames = info.patch_size, grid.t * info.temporal_patch_size if grid.t > 1 else 1
        shape = (frames, grid.h * patch, grid.w * patch, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        made.append(EncodeJob(pixels, grid, torch.empty(grid.num_patches // 4, info.embedding_width)))
    return made


@pytest.mark.parametrize("flop", [1.0, 1e6, 2e7])
def test_embeddings_are_the_same_in_blocks_of_any_size(
    flop: float, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[int] = []
    plain, blocked = engine_of(random_checkpoint), engine_of(random_checkpoint, lambda: signs.append(1))
    expected, found = jobs(plain), jobs(blocked)
    plain.encode(expected)
    monkeypatch.setattr(module, "BLOCK_FLOP", flop / torch.get_num_threads())
    blocked.encode(found)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-4, atol=1e-4)
    assert len(signs) > 3 * blocked.encoder.preparation.info.depth, "more than one a layer"


def test_signs_of_life_follow_the_work_and_not_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the patches are sixteen times the attention."""
    signs: list[int] = []
    engine = engine_of(EMBEDDED / "model", lambda: signs.append(1))
    monkeypatch.setattr(module, "BLOCK_FLOP", 2e6)
    counts, info = [], engine.encoder.preparation.info
    for side in (16, 32):
        grid = GridTHW(1, side, side)
        pixels = torch.zeros(1, side * info.patch_size, side * info.patch_size, 3, dtype=torch.uint8)
        signs.clear()
        engine.encode([EncodeJob(pixels, grid, torch.empty(side * side // 4, info.embedding_width))])
        counts.append(len(signs))
    assert counts[1] > 4 * counts[0]


def test_no_block_has_more_work_than_it_may() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(5, 6, 40, 8, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    of_row = 4.0 * 40 * 8
    for most, num_blocks in (
        (1e9, 1), (of_row * 40 * 6 * 2, 3), (of_row * 40 * 2, 5 * 3), (of_row * 10, 5 * 6 * 4)
    ):  # fmt: skip
        signs: list[int] = []
        found = Blocks(most, lambda: signs.append(1)).attend(q, k, v)  # noqa: B023
        torch.testing.assert_close(found, expected)
        assert len(signs) == num_blocks
