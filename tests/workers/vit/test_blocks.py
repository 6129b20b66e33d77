"""Forwards in blocks: the same embeddings, and a sign of life after a bounded amount of work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.wire.base import GridTHW
from tests.workers.vit.tiny_towers import TOWERS, make_jobs
from workers.nn.weights.registry import open_weights
from workers.vit.blocks import Blocks
from workers.vit.engines import torch as module
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.qwen2_vl import VisionEncoder

CPU = torch.device("cpu")
GRIDS = [GridTHW(1, 4, 6), GridTHW(1, 24, 18), GridTHW(3, 2, 8)]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("flop", [1.0, 3e4, 2e6])
def test_embeddings_are_the_same_in_blocks_of_any_size(
    flop: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[int] = []
    tiny = TOWERS[name](tmp_path)
    encoder = tiny.encoder()
    plain, blocked = TorchEngine(encoder), TorchEngine(encoder, after_work=lambda: signs.append(1))
    expected, found = make_jobs(tiny.info, GRIDS), make_jobs(tiny.info, GRIDS)
    plain.encode(expected)
    monkeypatch.setattr(module, "BLOCK_FLOP", flop / torch.get_num_threads())
    blocked.encode(found)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-4, atol=1e-4)
    assert len(signs) > 3 * tiny.info.depth, "more than one a layer"


def test_signs_of_life_follow_the_work_and_not_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the patches are sixteen times the attention."""
    signs: list[int] = []
    folder = EMBEDDED / "model"
    encoder = VisionEncoder(read_model_info(folder).vision, open_weights(folder, torch.float32, CPU))
    engine = TorchEngine(encoder, after_work=lambda: signs.append(1))
    monkeypatch.setattr(module, "BLOCK_FLOP", 2e6)
    counts, info = [], engine.encoder.preparation.info
    for side in (16, 32):
        grid = GridTHW(1, side, side)
        pixels = torch.zeros(1, side * info.patch_size, side * info.patch_size, 3, dtype=torch.uint8)
        signs.clear()
        engine.encode([EncodeJob(pixels, grid, torch.empty(side * side // 4, info.embedding_width))])
        counts.append(len(signs))
    assert counts[1] > 4 * counts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_block_has_more_work_than_it_may(dtype: torch.dtype) -> None:
    """In bfloat16 with a kernel, where there is one."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(5, 40, 6, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    of_row = 4.0 * 40 * 8
    for most, num_blocks in (
        (1e9, 1), (of_row * 40 * 6 * 2, 3), (of_row * 40 * 2, 5 * 3), (of_row * 10, 5 * 6 * 4)
    ):  # fmt: skip
        signs: list[int] = []
        found = Blocks(most, lambda: signs.append(1)).attend(q, k, v)  # noqa: B023
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
        assert len(signs) == num_blocks
