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
from workers.vit.blocks import FIRST_RATE, HURRIED_S, Blocks, Hurry
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


class Machine:
    """Computes a fixed number of floating point operations in a second."""

    def __init__(self, rate: float) -> None:
        self.now, self.rate, self.is_hurried = 0.0, rate, False
        self.flop: list[float] = []

    def run(self, blocks: Blocks, num_rows: int, flop_per_row: float) -> None:
        def compute(x: torch.Tensor) -> tuple[torch.Tensor]:
            self.flop.append(len(x) * flop_per_row)
            self.now += self.flop[-1] / self.rate
            return (x + 1,)

        x = torch.arange(num_rows)
        (found,) = blocks.rows(compute, flop_per_row, x)
        torch.testing.assert_close(found, x + 1)


def test_in_a_hurry_blocks_are_as_short_as_was_asked_for() -> None:
    machine, signs = Machine(rate=4 * FIRST_RATE), list[int]()
    hurry = Hurry(lambda: machine.is_hurried, lambda: machine.now)
    blocks = Blocks(1e12, lambda: signs.append(1), hurry)
    machine.run(blocks, 1000, 1e6)
    assert len(signs) == 1, "nobody waits"
    machine.is_hurried = True
    machine.run(blocks, 1000, 1e6)
    lasted = [flop / machine.rate for flop in machine.flop[1:]]
    assert HURRIED_S / 2 < max(lasted) <= HURRIED_S
    assert len(set(machine.flop[1:])) == 2, "of one size, but for the last"


def test_a_hurry_that_begins_within_a_layer_shortens_what_is_left_of_it() -> None:
    machine = Machine(FIRST_RATE)

    def hurry_now() -> None:
        machine.is_hurried = True

    blocks = Blocks(1e9, hurry_now, Hurry(lambda: machine.is_hurried, lambda: machine.now))
    machine.run(blocks, 4000, 1e6)
    assert machine.flop[0] == 1e9
    assert max(machine.flop[1:]) <= FIRST_RATE * HURRIED_S
