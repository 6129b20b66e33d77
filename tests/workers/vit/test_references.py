"""Each tower beside transformers', with tiny random weights: pictures and videos of many sizes, in each
engine that runs here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.wire.base import GridTHW
from tests.workers.vit.tiny_towers import (
    GRIDS,
    MERGE,
    TOWERS,
    TinyTower,
    make_jobs,
    plain_tower,
    windowed_tower,
)
from workers.nn.weights.dense import Dense, TorchLinear
from workers.vit.engines.batch import BatchEngine
from workers.vit.engines.onnx import export
from workers.vit.engines.onnxruntime import OnnxRuntimeEngine
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob, Encoder, Inputs

CPU = torch.device("cpu")
MAKE = {
    **TOWERS,
    **{f"windows of {size}": partial(windowed_tower, window_size=size) for size in (1, 2, 4, 5)},
    "no deepstack": plain_tower,
}
BFLOAT16_TOLERANCE = 2e-2  # of the norm


@pytest.fixture(scope="module", params=MAKE)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyTower:
    return MAKE[request.param](tmp_path_factory.mktemp("tower"))


class BatchesInTorch(BatchEngine):
    """Runs what is exported, before the export."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.preparation, encoder.dtype, CPU)
        self._encoder = encoder

    def _run(self, tensors: Any, num_patches: int, out: Tensor) -> None:
        out.copy_(self._encoder.forward(Inputs(tensors, {})))


def check(jobs: Sequence[EncodeJob], expected: Tensor, dtype: torch.dtype) -> None:
    assert 0.3 < expected.std() < 30, "so that the tolerances mean something"
    for job, theirs in zip(jobs, expected.split([len(job.output) for job in jobs]), strict=True):
        assert job.output.isfinite().all(), job.grid_thw
        if dtype == torch.float32:
            torch.testing.assert_close(job.output, theirs, rtol=1e-4, atol=1e-4, msg=f"{job.grid_thw}")
        else:
            error = (job.output.float() - theirs).norm() / theirs.norm()
            assert error < BFLOAT16_TOLERANCE, job.grid_thw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_embeddings_are_those_of_transformers(tiny: TinyTower, dtype: torch.dtype) -> None:
    engine, jobs = TorchEngine(tiny.encoder(dtype)), make_jobs(tiny.info, dtype=dtype)
    expected = tiny.expected(jobs)
    engine.encode(jobs)  # all in one batch
    check(jobs, expected, dtype)
    for job in jobs:
        job.output.fill_(torch.nan)
        engine.encode([job])
    check(jobs, expected, dtype)


def test_embeddings_of_frames_of_one_size_are_those_of_transformers(tiny: TinyTower) -> None:
    jobs = make_jobs(tiny.info)
    BatchesInTorch(tiny.encoder()).encode(jobs)
    check(jobs, tiny.expected(jobs), torch.float32)


@pytest.mark.parametrize("name", ["windowed", "deepstack"])
def test_embeddings_under_onnxruntime_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tiny = TOWERS[name](tmp_path / "tower")
    file, jobs = tmp_path / "tower.onnx", make_jobs(tiny.info)
    export(tiny.encoder(dense=Dense(TorchLinear)), file)
    OnnxRuntimeEngine(tiny.tower.preparation(tiny.info), file, torch.float32, CPU, 1).encode(jobs)
    check(jobs, tiny.expected(jobs), torch.float32)


def test_grids_are_of_many_kinds() -> None:
    assert len(GRIDS) == 30
    sides = {side // MERGE for grid in GRIDS for side in grid[1:]}
    assert sides >= set(range(1, 10))
    assert len({GridTHW(1, *grid[1:]) for grid in GRIDS}) < 30, "some of one size"
