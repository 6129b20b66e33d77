"""Pictures of requests with adapters of the tower, in one call of the engine: each as the tower with that
adapter merged makes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.adapters import Adapter, read_adapter
from pipeline.adapters.files import TOWER
from tests.adapters import SPREAD, merged
from tests.workers.vit.tiny_towers import GRIDS, TOWERS, TinyTower, make_jobs
from tools.random_checkpoint.lora import write_adapter
from workers.nn.weights.adapters import NO_ADAPTER, AdapterSet
from workers.nn.weights.registry import open_weights
from workers.vit.engines.choice import EngineSpec, choose_engine
from workers.vit.engines.torch import TorchEngine

CPU = torch.device("cpu")
SOME_GRIDS = GRIDS[5:13]


def engine_of(tiny: TinyTower, adapters: Sequence[Adapter] = ()) -> TorchEngine:
    made = AdapterSet(adapters, lambda module: module.startswith(TOWER), torch.float32, CPU)
    weights = open_weights(tiny.folder, torch.float32, CPU, adapters=made)
    engine = TorchEngine(tiny.tower.encoder(tiny.info, weights), adapters=made)
    made.check_all_loaded()
    return engine


@pytest.mark.parametrize("kind", TOWERS)
def test_each_picture_has_its_own_adapter(kind: str, tmp_path: Path) -> None:
    tiny = TOWERS[kind](tmp_path / "base")
    folders = [write_adapter(tiny.folder, tmp_path / name, 3, SPREAD) for name in ("one", "two")]
    numbers = [0, NO_ADAPTER, 1, 1, 0, NO_ADAPTER, 0, 1]
    asked = make_jobs(tiny.info, SOME_GRIDS)
    asked = [job._replace(adapter=number) for job, number in zip(asked, numbers, strict=True)]
    engine_of(tiny, [read_adapter("", folder) for folder in folders]).encode(asked)
    differ = []
    for number in (NO_ADAPTER, 0, 1):
        place = tiny.folder
        if number != NO_ADAPTER:
            place = merged(tiny.folder, folders[number], tmp_path / f"merged-{number}")
        wanted = make_jobs(tiny.info, SOME_GRIDS)
        engine_of(tiny._replace(folder=place)).encode(wanted)
        for job, other in zip(asked, wanted, strict=True):
            difference = float((job.output - other.output).norm() / other.output.norm())
            if job.adapter == number:
                assert difference < 1e-4, (job.grid_thw, number)
            else:
                differ.append(difference)
    assert min(differ) > 1e-2, "an adapter counts"


@pytest.fixture
def tower_adapter(random_checkpoint: Path, tmp_path: Path) -> Adapter:
    return read_adapter("eyes", write_adapter(random_checkpoint, tmp_path / "eyes", 2))


def spec_of(folder: Path, adapters: Sequence[Adapter]) -> EngineSpec:
    from pipeline.families import read_model_info
    from workers.vit.slices import SliceLimit

    return EngineSpec(
        info=read_model_info(folder), folder=folder, dtype=torch.float32, device=CPU, num_threads=1,
        cache=folder, progress=lambda done, total: None, limit=SliceLimit(1024, None), adapters=adapters,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_engines_of_exported_files_are_refused(
    engine: str, random_checkpoint: Path, tower_adapter: Adapter
) -> None:
    with pytest.raises(
        ValueError, match=rf"'eyes' changes the ViT, which vit_engine '{engine}' .*--vit-engine torch"
    ):
        choose_engine(engine, spec_of(random_checkpoint, [tower_adapter]))


def test_auto_is_torch(random_checkpoint: Path, tower_adapter: Adapter) -> None:
    spec = spec_of(random_checkpoint, [tower_adapter])
    assert spec.needs_torch
    assert isinstance(choose_engine("auto", spec), TorchEngine)
