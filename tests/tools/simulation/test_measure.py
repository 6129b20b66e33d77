"""What is measured, as the simulation takes it. The server is a fake: that one measures is for `--check`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.families import ModelInfo
from tools.bench_serving import Result, Workload
from tools.simulation import measure
from tools.simulation.load import Camera
from tools.simulation.measure import Bench, predict, takes_turns
from tools.simulation.stages import EncodeCost, StageTimes, StepCost

TIMES = StageTimes(step=(StepCost(fixed_s=0.01, prefill_s=1e-4),), encode=(EncodeCost(patch_s=1e-4),))


async def answer(
    url: str, workload: Workload, chats: Sequence[Any], concurrency: int, rate: float, rng: random.Random
) -> list[Result]:
    """One request a second; each has its pictures, 30 tokens of text, and an answer of three tokens."""
    return [
        Result(
            sent=100.0 + number, ttft=0.5, e2el=0.9,
            arrivals=[100.5 + number, 100.7 + number, 100.9 + number],
            num_prompt_tokens=30 + 64 * workload.num_images, num_output_tokens=3,
        )
        for number in range(len(chats))
    ]  # fmt: skip


@pytest.mark.parametrize("asked", [{"rate": 1.0}, {"concurrency": 2}])
def test_a_measured_load_is_simulated_as_it_was(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch, asked: dict[str, float]
) -> None:
    monkeypatch.setattr(measure, "run_load", answer)
    workload = Workload(num_words=3, num_images=2, sizes=((224, 224),))
    found = Bench("http://nowhere", Camera(info), 0).run("x", workload, 4, **asked)  # type: ignore[arg-type]
    assert [one.at for one in found.load.submissions] == ([0, 1, 2, 3] if "rate" in asked else [0.0] * 4)
    assert found.load.concurrency == asked.get("concurrency", 0)
    for one in found.load.submissions:
        assert (one.num_text_tokens, one.num_prompt_tokens, one.num_output) == (30, 158, 3)
        assert [picture.megapixels for picture in one.pictures] == [224 * 224 / 1e6] * 2
    assert len({picture.content for one in found.load.submissions for picture in one.pictures}) == 8
    summary = found.summary
    assert (summary.ttft_p50, summary.itl_p50) == pytest.approx((0.5, 0.2))
    assert summary.requests_per_s == pytest.approx(4 / 3.9)
    predicted = predict(TIMES, info, found).outcomes
    assert [len(one.arrivals) for one in predicted] == [3] * 4


def test_roles_take_turns_on_two_cores_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for cores, expected in (({0, 1}, True), (set(range(8)), False)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: cores)
        assert takes_turns([]) is expected
        for options in (["--cpu-sharing", "fixed"], ["--llm-cores=2"]):
            assert not takes_turns(options)
