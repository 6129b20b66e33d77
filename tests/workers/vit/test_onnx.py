"""The encoder as an ONNX file under onnxruntime, beside the torch engine, which is compared with Hugging Face
elsewhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from torch import Tensor

from pipeline.families import ModelInfo, read_model_info
from pipeline.wire.base import GridTHW
from workers.nn.loader import Checkpoint
from workers.nn.weights import registry
from workers.nn.weights.base import Linear
from workers.nn.weights.dense import Dense
from workers.nn.weights.registry import open_weights
from workers.nn.weights.shard import Shard
from workers.vit.engines import onnx as export_module
from workers.vit.engines.choice import EngineSpec, choose_engine, warm_up
from workers.vit.engines.onnx import exported, locked, unfinished
from workers.vit.engines.onnxruntime import OnnxRuntimeEngine
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob, Encoder
from workers.vit.models.patches import PatchPreparation
from workers.vit.models.qwen2_vl import VisionEncoder
from workers.vit.slices import SliceLimit

CPU = torch.device("cpu")
GRIDS = [
    GridTHW(1, 4, 6),
    GridTHW(1, 8, 4),
    GridTHW(1, 4, 6),
    GridTHW(3, 2, 2),
    GridTHW(1, 16, 16),
    GridTHW(2, 4, 6),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}


def no_progress(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def info(random_checkpoint: Path) -> ModelInfo:
    return read_model_info(random_checkpoint)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def make_jobs(info: ModelInfo, dtype: torch.dtype) -> list[EncodeJob]:
    """Outputs are parts of one block, as in a pool; what nobody writes stays NaN."""
    generator = torch.Generator().manual_seed(0)
    vision = info.vision
    block, start, jobs = torch.full((200, vision.embedding_width), torch.nan, dtype=dtype), 0, []
    for grid in GRIDS:
        frames = grid.t * vision.temporal_patch_size if grid.t > 1 else 1
        size = grid.h * vision.patch_size, grid.w * vision.patch_size
        pixels = torch.randint(0, 256, (frames, *size, 3), dtype=torch.uint8, generator=generator)
        count = vision.num_tokens(grid)
        jobs.append(EncodeJob(pixels, grid, block[start : start + count]))
        start += count
    return jobs


def make_spec(info: ModelInfo, folder: Path, dtype: torch.dtype, cache: Path) -> EngineSpec:
    return EngineSpec(
        info=info, folder=folder, dtype=dtype, device=CPU, num_threads=1, cache=cache, progress=no_progress,
        limit=SliceLimit(4096, None)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_embeddings_are_those_of_the_torch_engine(
    dtype: torch.dtype, info: ModelInfo, random_checkpoint: Path, cache: Path
) -> None:  # fmt: skip
    """Sizes that the export never saw, several of one size, videos."""
    reference = TorchEngine(VisionEncoder(info.vision, open_weights(random_checkpoint, torch.float32, CPU)))
    file = exported(info, random_checkpoint, dtype, cache, no_progress)
    assert "Attention" in {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}, (
        "runtimes have no fused one else"
    )
    expected, found = make_jobs(info, torch.float32), make_jobs(info, dtype)
    reference.encode(expected)
    OnnxRuntimeEngine(PatchPreparation(info.vision), file, dtype, CPU, 1).encode(found)
    for theirs, ours in zip(expected, found, strict=True):
        error = (theirs.output - ours.output.float()).norm() / theirs.output.norm()
        assert error < TOLERANCE[dtype], theirs.grid_thw


def test_no_picture_sees_another(info: ModelInfo, random_checkpoint: Path, cache: Path) -> None:
    file = exported(info, random_checkpoint, torch.float32, cache, no_progress)
    engine = OnnxRuntimeEngine(PatchPreparation(info.vision), file, torch.float32, CPU, 1)
    together, changed = make_jobs(info, torch.float32), make_jobs(info, torch.float32)
    changed[0].pixels.zero_()  # of the same size as the third
    engine.encode(together)
    engine.encode(changed)
    assert not torch.equal(together[0].output, changed[0].output)
    assert all(
        torch.equal(before.output, after.output)
        for before, after in zip(together[1:], changed[1:], strict=True)
    )


def test_a_second_start_exports_nothing(
    info: ModelInfo, random_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    first = exported(info, random_checkpoint, torch.float32, cache, no_progress)
    monkeypatch.setattr(export_module, "export", lambda *args: pytest.fail("exported again"))
    assert exported(info, random_checkpoint, torch.float32, cache, no_progress) == first
    spec = make_spec(info, random_checkpoint, torch.bfloat16, cache)
    warm_up(choose_engine("onnxruntime", spec), spec, 64)


def test_processes_that_start_together_export_once(
    info: ModelInfo, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    exports = []

    def export(encoder: Encoder, file: Path) -> None:
        exports.append(file)
        file.write_text("a file")

    monkeypatch.setattr(export_module, "export", export)
    threads = [
        threading.Thread(
            target=exported, args=(info, random_checkpoint, torch.float32, tmp_path, no_progress)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(exports) == 1
    other = exported(info, random_checkpoint, torch.float16, tmp_path, no_progress)
    assert len(exports) == 2, "a file for each type"
    assert other.read_text() == "a file"


def test_a_long_export_is_reported_as_long_as_it_computes(
    info: ModelInfo, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Else one of more than ten minutes counts as a start that failed."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(export_module, "REPORT_S", 0.05)

    def export(encoder: Encoder, file: Path) -> None:
        told.clear()  # of the weights
        deadline = time.monotonic() + 20
        while len(told) < 3 and time.monotonic() < deadline:
            sum(range(1000))
        num_told = len(told)
        time.sleep(0.5)
        assert len(told) <= num_told + 1, "one that stands still is not reported"
        file.write_text("a file")

    monkeypatch.setattr(export_module, "export", export)
    exported(info, random_checkpoint, torch.float32, tmp_path, lambda done, total: told.append((done, total)))
    assert told[:3] == [(0, 1)] * 3
    num_told = len(told)
    assert "report" not in {thread.name for thread in threading.enumerate()}
    assert len(told) == num_told


def test_an_export_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        with unfinished(tmp_path / "place") as draft:
            (draft / "half").write_text("")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_anothers_export_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the launcher would take a wait of ten minutes for a standstill."""
    monkeypatch.setattr("workers.vit.engines.onnx.WAIT_S", 0.01)
    told: list[tuple[int, int]] = []
    place, may_end = tmp_path / "engine", threading.Event()

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 5:
            may_end.set()

    def make() -> None:
        with locked(place, lambda done, total: None):
            has_begun.set()
            assert may_end.wait(10)

    has_begun = threading.Event()
    other = threading.Thread(target=make)
    other.start()
    assert has_begun.wait(10)
    with locked(place, tell):
        assert len(told) >= 5
    other.join(10)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Of each file that would be exported, its place."""
    made: list[Path] = []

    def export(encoder: Encoder, file: Path) -> None:
        made.append(file)
        file.write_text("a file")

    monkeypatch.setattr(export_module, "export", export)
    return made


def with_config(source: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_tower_in_an_unknown_format_is_refused_by_the_key(
    info: ModelInfo, random_checkpoint: Path, tmp_path: Path, exports: list[Path]
) -> None:  # fmt: skip
    folder = with_config(random_checkpoint, tmp_path / "m", quantization_config={"quant_method": "hqq"})
    with pytest.raises(ValueError, match=r"by 'hqq' \(config\.json, key quantization_config\.quant_method\)"):
        exported(info, folder, torch.float32, tmp_path / "cache", no_progress)
    assert not exports


def test_the_format_that_the_checkpoint_names_reads_the_tower(
    info: ModelInfo, random_checkpoint: Path, tmp_path: Path, exports: list[Path],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    read: list[str] = []

    class Toy(Dense):
        name = "toy"

        def holds(self, checkpoint: Checkpoint, module: str) -> bool:
            return module.endswith("mlp.fc1")

        def column(
            self, checkpoint: Checkpoint, modules: Sequence[str], shards: Sequence[Shard], bias: Tensor | None
        ) -> Linear:  # fmt: skip
            read.extend(modules)
            return super().column(checkpoint, modules, shards, bias)

    monkeypatch.setitem(cast(dict[str, Any], registry.STORED_FORMATS), "toy", lambda config: Toy())
    folder = with_config(random_checkpoint, tmp_path / "m", quantization_config={"quant_method": "toy"})
    exported(info, folder, torch.float32, tmp_path / "cache", no_progress)
    assert read == [f"visual.blocks.{index}.mlp.fc1" for index in range(info.vision.depth)]
    assert len(exports) == 1


def test_the_servers_pixel_limits_need_no_new_export(
    info: ModelInfo, random_checkpoint: Path, tmp_path: Path, exports: list[Path]
) -> None:  # fmt: skip
    smaller = dataclasses.replace(info, vision=info.vision.with_pixel_limits(56 * 56, None))
    assert smaller.vision != info.vision
    files = {
        exported(one, random_checkpoint, torch.float32, tmp_path, no_progress) for one in (info, smaller)
    }
    assert len(files) == len(exports) == 1


def test_a_tower_of_another_package_is_exported_again_when_its_code_changes(
    info: ModelInfo, random_checkpoint: Path, tmp_path: Path, exports: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    package = tmp_path / "toy_towers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tower.py").write_text("from toy_towers.layers import TOWER\n")
    (package / "layers.py").write_text("from workers.vit.models.qwen2_vl import TOWER\n")
    monkeypatch.syspath_prepend(tmp_path)
    family = type("Toy", (type(info.family),), {"tower": "toy_towers.tower"})()
    toy = dataclasses.replace(info, family=family)

    def make() -> Path:
        return exported(toy, random_checkpoint, torch.float32, tmp_path / "cache", no_progress)

    first = make()
    assert make() == first
    assert len(exports) == 1
    (package / "layers.py").write_text("from workers.vit.models.qwen2_vl import TOWER  # in another way\n")
    assert make() != first
    assert len(exports) == 2
