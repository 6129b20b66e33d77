"""The contract between towers and engines, with a toy: one more input, of another type, and wider
embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.families import VisionInfo, read_model_info
from pipeline.wire.base import GridTHW
from tests.workers.vit.tiny_towers import TOWERS
from tests.workers.vit.tiny_towers import make_jobs as tiny_jobs
from workers.vit.engines.onnx import export
from workers.vit.engines.onnxruntime import OnnxRuntimeEngine
from workers.vit.engines.tensorrt import Profile, profiles_for
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import FRAMES, Axis, EncodeJob, Encoder, Inputs, InputSpec, Preparation, Range
from workers.vit.models.patches import patchify
from workers.vit.pace import UNPACED, Pace

CPU = torch.device("cpu")
GRIDS = [GridTHW(1, 4, 6), GridTHW(2, 2, 8), GridTHW(1, 4, 6), GridTHW(1, 8, 8)]
COLUMNS = 3 * 2 * 14 * 14


class ToyPreparation(Preparation):
    """Reads the tokens of each frame backwards: `order` says which place takes which token's patches."""

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        patches, tokens = Axis("patches", 1 << 16, 4), Axis("tokens", 1 << 14)
        return (
            InputSpec("patches", torch.float32, (FRAMES, patches, COLUMNS)),
            InputSpec("order", torch.int64, (tokens,)),
        )

    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        parts, start = [], 0
        for job in jobs:
            count = job.grid_thw.h * job.grid_thw.w // 4
            for _ in range(job.grid_thw.t):
                parts.append(torch.arange(start + count - 1, start - 1, -1))
                start += count
        patches = torch.cat([patchify(job.pixels, self.info) for job in jobs])
        return Inputs({"patches": patches, "order": torch.cat(parts)}, {"frames": [len(patches)]})

    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        count = jobs[0].grid_thw.h * jobs[0].grid_thw.w
        patches = torch.cat([patchify(job.pixels, self.info) for job in jobs]).unflatten(0, (-1, count))
        return Inputs({"patches": patches, "order": torch.arange(count // 4 - 1, -1, -1)}, {})

    def sizes(self, frames: Range, patches: Range) -> dict[str, Range]:
        return {**super().sizes(frames, patches), "tokens": Range(*(count // 4 for count in patches))}


class ToyEncoder(Encoder):
    def __init__(self, info: VisionInfo) -> None:
        self.preparation = ToyPreparation(info)
        self.dtype, self.device = torch.float32, CPU
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(info.embedding_width, 4 * COLUMNS, generator=generator) / 100

    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> torch.Tensor:
        x = inputs.tensors["patches"].unflatten(-2, (-1, 4)).flatten(-2)
        pace.after_layer()
        return torch.nn.functional.linear(x, self._weight).index_select(-2, inputs.tensors["order"])


@pytest.fixture
def encoder() -> ToyEncoder:
    info = read_model_info(EMBEDDED / "model").vision
    return ToyEncoder(dataclasses.replace(info, embedding_width=2 * info.embedding_width))


def make_jobs(info: VisionInfo) -> list[EncodeJob]:
    generator = torch.Generator().manual_seed(1)
    jobs = []
    for grid in GRIDS:
        size = grid.t * 2, grid.h * 14, grid.w * 14, 3
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        jobs.append(EncodeJob(pixels, grid, torch.full(info.embedding(grid, "float32").shape, torch.nan)))
    return jobs


def test_a_tower_with_inputs_of_its_own_runs_in_every_engine(encoder: ToyEncoder, tmp_path: Path) -> None:
    info = encoder.preparation.info
    expected, found = make_jobs(info), make_jobs(info)
    TorchEngine(encoder).encode(expected)
    export(encoder, tmp_path / "toy.onnx")
    OnnxRuntimeEngine(encoder.preparation, tmp_path / "toy.onnx", torch.float32, CPU, 1).encode(found)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-4, atol=1e-4)
        assert ours.output.shape[1] == 2 * read_model_info(EMBEDDED / "model").text.hidden_size


def test_the_shapes_of_inputs_follow_the_sizes_of_axes(encoder: ToyEncoder) -> None:
    patches, order = encoder.preparation.specs
    sizes = {"frames": 3, "patches": 24, "tokens": 6}
    assert patches.shape(sizes) == (3, 24, COLUMNS)
    assert order.shape(sizes) == (6,)
    assert (patches.is_by_frame, order.is_by_frame) == (True, False)


@pytest.mark.parametrize("name", TOWERS)
def test_what_a_tower_prepares_is_what_it_says(name: str, tmp_path: Path) -> None:
    """Engines are built for these shapes."""
    tower, info, *_ = TOWERS[name](tmp_path)
    preparation = tower.preparation(info)
    for job in tiny_jobs(info):
        tensors = preparation.batch([job, job], CPU).tensors
        frames, patches = 2 * job.grid_thw.t, job.grid_thw.h * job.grid_thw.w
        sizes = preparation.sizes(Range(1, 1, frames), Range(4, 4, patches))
        assert [spec.name for spec in preparation.specs] == list(tensors)
        for spec in preparation.specs:
            shape = tensors[spec.name].shape
            least, most = (
                spec.shape({key: getattr(r, end) for key, r in sizes.items()}) for end in ("least", "most")
            )
            assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
            assert tensors[spec.name].dtype == spec.dtype
            assert tensors[spec.name].is_contiguous()


@pytest.mark.parametrize("name", TOWERS)
def test_the_sizes_of_axes_are_in_order(name: str, tmp_path: Path) -> None:
    tower, info, *_ = TOWERS[name](tmp_path)
    for profile in (*profiles_for(info), Profile(Range(1, 1, 1), Range(4, 4, 4))):
        for sizes in tower.preparation(info).sizes(*profile).values():
            assert 0 < sizes.least <= sizes.usual <= sizes.most


@pytest.mark.parametrize("name", TOWERS)
def test_no_axis_of_the_sample_is_a_constant_for_tracing(name: str, tmp_path: Path) -> None:
    tower, info, *_ = TOWERS[name](tmp_path)
    preparation = tower.preparation(info)
    (job,) = tiny_jobs(info, [preparation.sample_grid])
    tensors = preparation.batch([job], CPU).tensors
    for spec in preparation.specs:
        assert all(
            size > 1
            for axis, size in zip(spec.axes, tensors[spec.name].shape, strict=True)
            if isinstance(axis, Axis)
        )
