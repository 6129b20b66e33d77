"""The torch engine against Hugging Face's vision tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from tests.pictures import encode, noise, scene, seen_size
from tests.reference import Reference
from workers.nn.weights.registry import open_weights
from workers.preprocess.images import decode, read_size
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.qwen2_vl import VisionEncoder

PICTURES = [scene(1), noise(2, (60, 200)), scene(3, (333, 222)), noise(4, (140, 140))]


@pytest.fixture(scope="module", params=["embedded", "random"])
def folder(request: pytest.FixtureRequest, random_checkpoint: Path) -> Path:
    return EMBEDDED / "model" if request.param == "embedded" else random_checkpoint


def jobs(folder: Path) -> tuple[TorchEngine, list[EncodeJob]]:
    info = read_model_info(folder)
    engine = TorchEngine(VisionEncoder(info.vision, open_weights(folder, torch.float32, torch.device("cpu"))))
    made = []
    for picture in PICTURES:
        data = encode(picture)
        target = seen_size(read_size(data, 10**8, ""), info)
        pixels = torch.from_numpy(np.array(decode(data, target, "")))[None]
        grid = info.vision.grid_of(target)
        made.append(EncodeJob(pixels, grid, torch.empty(grid.num_patches // 4, info.vision.embedding_width)))
    return engine, made


def test_patches_are_those_of_the_processor(folder: Path) -> None:
    engine, made = jobs(folder)
    expected = Reference(folder).processor(images=PICTURES, return_tensors="pt")
    ours = engine.encoder.prepare(made).tensors["patches"]
    assert [list(job.grid_thw) for job in made] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(ours, expected["pixel_values"], rtol=1e-5, atol=1e-5)


def test_embeddings_of_a_packed_batch_agree(folder: Path) -> None:
    engine, made = jobs(folder)
    engine.encode(made)
    reference = Reference(folder)
    processed = reference.processor(images=PICTURES, return_tensors="pt")
    with torch.inference_mode():
        expected = reference.model.model.visual(
            processed["pixel_values"], grid_thw=processed["image_grid_thw"]
        ).pooler_output
    ours = torch.cat([job.output for job in made])
    assert expected.std() > 0.01
    assert (ours - expected).norm() / expected.norm() < 1e-4
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-4


def test_no_picture_sees_its_neighbours(folder: Path) -> None:
    engine, made = jobs(folder)
    engine.encode(made)
    together = [job.output.clone() for job in made]
    for job, expected in zip(made, together, strict=True):
        engine.encode([job])
        torch.testing.assert_close(job.output, expected, rtol=1e-4, atol=1e-4)
