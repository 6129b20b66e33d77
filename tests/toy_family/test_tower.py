from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.families import ModelInfo
from pipeline.wire.base import GridTHW
from tests.toy_family.checkpoint import make_toy
from tests.toy_family.family import ToyFamily
from tests.toy_family.reference import Reference
from workers.nn.loader import no_progress
from workers.vit.engines.choice import EngineSpec, choose_engine
from workers.vit.models.base import EncodeJob
from workers.vit.slices import SliceLimit

CPU = torch.device("cpu")
GRIDS = [GridTHW(1, 3, 6), GridTHW(3, 6, 3), GridTHW(1, 6, 3), GridTHW(1, 9, 12)]


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return ToyFamily().read(make_toy(tmp_path_factory.mktemp("toy") / "model", False), None, None)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_every_engine_encodes_what_the_reference_does(name: str, info: ModelInfo, tmp_path: Path) -> None:
    rng, reference = np.random.default_rng(0), Reference(info.folder)
    spec = EngineSpec(
        info=info, folder=info.folder, dtype=torch.float32, device=CPU, num_threads=1, cache=tmp_path,
        progress=no_progress, limit=SliceLimit(4096, None), after_work=lambda: None,
    )  # fmt: skip
    jobs: list[EncodeJob] = []
    for grid in GRIDS:
        pixels = torch.from_numpy(rng.integers(0, 256, (grid.t, 10 * grid.h, 10 * grid.w, 3), dtype=np.uint8))
        jobs.append(EncodeJob(pixels, grid, torch.empty(info.vision.embedding(grid, "float32").shape)))
    choose_engine(name, spec).encode(jobs)
    for job in jobs:
        torch.testing.assert_close(job.output, reference.encode(job.pixels.numpy()), rtol=1e-4, atol=1e-4)
