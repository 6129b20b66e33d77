"""The TensorRT engine without a GPU: the real encoder is read and built by TensorRT-RTX; what is around an
engine runs on a stand-in for it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.families import ModelInfo, read_model_info
from tests.workers.vit.test_onnx import CPU, GRIDS, make_jobs, make_spec, no_progress
from tests.workers.vit.tiny_towers import TOWERS
from tests.workers.vit.tiny_towers import make_jobs as tiny_jobs
from workers.nn.weights.dense import Dense, TorchLinear
from workers.nn.weights.registry import open_weights
from workers.vit.engines import tensorrt as module
from workers.vit.engines.choice import choose_engine
from workers.vit.engines.onnx import export, exported
from workers.vit.engines.tensorrt import Profile, TensorRtEngine, build, built, load_tensorrt, profiles_for
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import Encoder, Inputs, Range
from workers.vit.models.patches import PatchPreparation
from workers.vit.models.qwen2_vl import VisionEncoder


@pytest.fixture(scope="module")
def info(random_checkpoint: Path) -> ModelInfo:
    return read_model_info(random_checkpoint)


@pytest.fixture(scope="module")
def preparation(info: ModelInfo) -> PatchPreparation:
    return PatchPreparation(info.vision)


@pytest.fixture(scope="module")
def trt() -> Any:
    try:
        return load_tensorrt()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was exported once serves all tests."""
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_encoder_is_built_for_a_gpu_that_is_not_here(
    dtype: torch.dtype, info: ModelInfo, random_checkpoint: Path, trt: Any, files: Path
) -> None:  # fmt: skip
    file = exported(info, random_checkpoint, dtype, files, no_progress)
    told: list[tuple[int, int]] = []
    made = PatchPreparation(info.vision)
    capability = trt.ComputeCapability.SM89
    engine = build(trt, file, made, lambda done, total: told.append((done, total)), capability)
    weights = sum(path.stat().st_size for path in file.parent.iterdir())
    assert len(engine) > weights // 2
    assert all(0 <= done <= total for done, total in told)
    assert max(done for done, _ in told) > 1


@pytest.mark.parametrize("name", ["windowed", "deepstack"])
def test_every_tower_is_built_for_a_gpu_that_is_not_here(name: str, trt: Any, tmp_path: Path) -> None:
    tiny = TOWERS[name](tmp_path / "tower")
    file = tmp_path / "tower.onnx"
    export(tiny.encoder(torch.bfloat16, Dense(TorchLinear)), file)
    preparation = tiny.tower.preparation(tiny.info)
    assert build(trt, file, preparation, no_progress, trt.ComputeCapability.SM89)


def test_an_engine_is_built_once_for_a_gpu_and_a_version(
    info: ModelInfo, preparation: PatchPreparation, random_checkpoint: Path, files: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trt = SimpleNamespace(__name__="tensorrt", __version__="11.4")
    file = exported(info, random_checkpoint, torch.float16, files, no_progress)
    builds: list[str] = []
    monkeypatch.setattr(module, "build", lambda *args: builds.append("built") or b"engine")
    first = built(trt, preparation, file, "H100", tmp_path, no_progress)
    assert built(trt, preparation, file, "H100", tmp_path, no_progress) == first
    assert first.read_bytes() == b"engine"
    assert len(builds) == 1
    others = {built(trt, preparation, file, "A100", tmp_path, no_progress)}
    trt.__version__ = "11.5"
    others.add(built(trt, preparation, file, "H100", tmp_path, no_progress))
    assert len(builds) == 3
    assert len({first, *others}) == 3

    def fail(*args: object) -> bytes:
        raise RuntimeError("no")

    monkeypatch.setattr(module, "build", fail)
    with pytest.raises(RuntimeError, match="no"):
        built(trt, preparation, file, "B200", tmp_path, no_progress)
    assert len(list((tmp_path / "tensorrt").glob("*/"))) == 3, "of a build that failed nothing is left"


def test_what_cannot_be_read_is_an_error(preparation: PatchPreparation, trt: Any, tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match="cannot read the encoder"):
        build(trt, tmp_path / "encoder.onnx", preparation, no_progress)


class FakeContext:
    """Does what an execution context does, on the CPU: by shapes and addresses alone."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        preparation = self._engine.encoder.preparation
        self._shapes[name] = shape
        ranges = preparation.sizes(*self._engine.profiles[self.profile])
        (spec,) = (spec for spec in preparation.specs if spec.name == name)
        least, most = (spec.shape({axis: sizes[end] for axis, sizes in ranges.items()}) for end in (0, 2))
        is_within = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        return is_within and "shape" not in self._engine.broken

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return "address" not in self._engine.broken

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        frames, patches, _ = self._shapes["patches"]
        return (frames, patches // 4, self._engine.encoder.preparation.info.embedding_width)

    def execute_async_v3(self, stream: int) -> bool:
        self._engine.runs.append((self.profile, self._shapes["patches"][:2]))
        encoder = self._engine.encoder
        dtypes = {spec.name: spec.dtype for spec in encoder.preparation.specs}
        tensors = {
            name: _at(self._addresses[name], shape, dtypes[name]) for name, shape in self._shapes.items()
        }
        out = _at(self._addresses["embeddings"], self.get_tensor_shape("embeddings"), torch.float32)
        out.copy_(encoder.forward(Inputs(tensors, {})))
        return "run" not in self._engine.broken


class FakeEngine:
    def __init__(self, encoder: Encoder, profiles: tuple[Profile, ...]) -> None:
        self.encoder, self.profiles = encoder, profiles
        self.runs: list[tuple[int, tuple[int, ...]]] = []
        self.broken = ""

    def create_execution_context(self) -> FakeContext | None:
        return None if "context" in self.broken else FakeContext(self)


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = int(torch.tensor(shape).prod()) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype).view(shape)


@pytest.fixture
def fake(info: ModelInfo, random_checkpoint: Path) -> tuple[Any, FakeEngine]:
    return fake_of(VisionEncoder(info.vision, open_weights(random_checkpoint, torch.float32, CPU)))


def fake_of(encoder: Encoder) -> tuple[Any, FakeEngine]:
    engine = FakeEngine(encoder, profiles_for(encoder.preparation.info))
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"engine" else None)
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(Runtime=lambda log: runtime, Logger=logger), engine


@pytest.mark.parametrize("name", TOWERS)
def test_jobs_run_within_the_profiles_and_into_the_pool(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    tiny = TOWERS[name](tmp_path)
    trt, engine = fake_of(tiny.encoder())
    few = (
        Profile(Range(1, 1, 2), Range(4, 24, 32)),
        Profile(Range(1, 1, 1), Range(4, 256, 1600)),
    )
    monkeypatch.setattr(module, "profiles_for", lambda _: few)
    engine.profiles = few
    expected, found = tiny_jobs(tiny.info, GRIDS), tiny_jobs(tiny.info, GRIDS)
    TorchEngine(engine.encoder).encode(expected)
    TensorRtEngine(trt, engine.encoder.preparation, b"engine", torch.float32, CPU).encode(found)
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.allclose(theirs.output, ours.output, atol=1e-4), theirs.grid_thw
    assert {profile for profile, _ in engine.runs} == {0, 1}
    assert sorted(frames for profile, (frames, _) in engine.runs if profile == 0) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("broken", ["shape", "address", "run"])
def test_a_call_that_fails_is_an_error(broken: str, info: ModelInfo, fake: tuple[Any, FakeEngine]) -> None:
    trt, engine = fake
    made = TensorRtEngine(trt, PatchPreparation(info.vision), b"engine", torch.float32, CPU)
    engine.broken = broken
    with pytest.raises(RuntimeError, match="failed"):
        made.encode(make_jobs(info, torch.float32))


def test_an_engine_that_is_for_another_machine_is_an_error(
    info: ModelInfo, fake: tuple[Any, FakeEngine]
) -> None:  # fmt: skip
    trt, engine = fake
    with pytest.raises(RuntimeError, match="cannot load"):
        TensorRtEngine(trt, PatchPreparation(info.vision), b"foreign", torch.float32, CPU)
    engine.broken = "context"
    with pytest.raises(RuntimeError, match="memory"):
        TensorRtEngine(trt, PatchPreparation(info.vision), b"engine", torch.float32, CPU)


def test_profiles_hold_every_size_of_the_largest_picture() -> None:
    for largest in (19_600, 200_000, 12_845_056):
        info: Any = SimpleNamespace(merge_size=2, patch_size=14, largest_pixels=largest)
        profiles = profiles_for(info)
        assert profiles[-1].patches.most * 14 * 14 >= largest
        for profile in profiles:
            assert all(count % 4 == 0 for count in profile.patches), "whole tokens"
            for sizes in profile:
                assert list(sizes) == sorted(sizes)


def test_it_is_refused_where_it_cannot_be(info: ModelInfo, random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_engine("tensorrt", make_spec(info, random_checkpoint, torch.float16, tmp_path))
