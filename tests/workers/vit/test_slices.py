from __future__ import annotations

from typing import Any

import torch

from pipeline.families import ModelInfo
from pipeline.wire.base import GridTHW
from tests.workers.vit.test_onnx import CPU, cache, info, make_jobs  # noqa: F401
from workers.nn.weights.registry import open_weights
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.qwen2_vl import VisionEncoder
from workers.vit.slices import SliceLimit


def test_a_batch_shrinks_to_what_fits_the_turn() -> None:
    limit = SliceLimit(4096, 0.010)
    assert limit.max_patches == 4096, "nothing is known yet"
    limit.observe(1000, 0.050)
    assert limit.max_patches == 200
    assert [limit.num_turns(count) for count in (1, 200, 201, 1000)] == [1, 1, 2, 5]
    for _ in range(100):
        limit.observe(1000, 0.001)
    assert limit.max_patches == 4096
    assert limit.num_turns(4000) == 1


def test_what_a_forward_costs_as_such_does_not_make_batches_tiny() -> None:
    """8 ms of launches and 10 us a patch: small pictures first, which alone look as if a patch took 0.1
    ms."""
    limit = SliceLimit(4096, 0.020)
    for count in (64, 100, 64, 256, 80, 128, 300, 64, 500):
        limit.observe(count, 0.008 + 1e-5 * count)
    assert 1000 <= limit.max_patches <= 1300
    assert limit.num_turns(2400) == 2


def test_without_a_turn_only_patches_count() -> None:
    limit = SliceLimit(4096, None)
    limit.observe(1, 100.0)
    assert limit.max_patches == 4096
    assert limit.num_turns(10**6) == 1


def test_even_the_slowest_device_goes_on() -> None:
    limit = SliceLimit(4096, 0.001)
    limit.observe(4, 1000.0)
    assert limit.max_patches == 1


def test_a_large_picture_is_encoded_in_turns_with_the_same_result(
    info: ModelInfo, random_checkpoint: Any, monkeypatch: Any  # noqa: F811
) -> None:  # fmt: skip
    limit = SliceLimit(4096, 0.010)
    engine = TorchEngine(
        VisionEncoder(info.vision, open_weights(random_checkpoint, torch.float32, CPU)), limit
    )
    waits: list[int] = []
    monkeypatch.setattr(engine, "_wait", lambda: waits.append(1))
    expected, found = make_jobs(info, torch.float32)[4:5], make_jobs(info, torch.float32)[4:5]
    engine.encode(expected)
    assert expected[0].grid_thw == GridTHW(1, 16, 16)
    assert len(waits) == 1
    limit.observe(256, 0.020)
    engine.encode(found)
    assert torch.equal(found[0].output, expected[0].output)
    assert len(waits) == 1 + info.vision.depth + 1, "two turns are wanted, and three layers go one by one"
