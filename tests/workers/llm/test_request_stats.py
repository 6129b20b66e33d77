"""When requests wait, compute and yield: with a clock that the test turns, and in a real engine."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pipeline.process.metrics import Metrics
from pipeline.wire.clients import AbortRequest
from pipeline.wire.metrics import Metric
from pipeline.wire.sampling import FinishReason, SamplingParams
from tests.chats import CHATS
from tests.engine_rig import CLIENT, Rig
from workers.llm.request import Request
from workers.llm.request_stats import RequestStats, token_bounds


def make() -> Request:
    positions = np.zeros((3, 6), dtype=np.int32)
    return Request(b"c", "a", 1, 1, [1] * 6, positions, 0, [], (), SamplingParams(max_tokens=9), 9)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Told:
    def __init__(self) -> None:
        self.metrics, self.clock = Metrics(), Clock()
        self.stats = RequestStats(self.metrics, 1000, self.clock)

    def at(self, now: float) -> RequestStats:
        self.clock.now = now
        return self.stats

    def histogram(self, name: str) -> tuple[int, float]:
        metric = _named(self.metrics, name)
        return sum(metric.counts), metric.total


def _named(metrics: Metrics, name: str) -> Metric:
    return next(metric for metric in metrics.told() if metric.name == name)


def test_the_times_of_a_request() -> None:
    told = Told()
    request = make()
    request.arrived_at = 98.0
    told.at(100).on_added(request)
    request.num_cached_tokens = 4
    told.at(101).on_admitted(request)
    told.at(103).on_admitted(request)  # preempted meanwhile
    for now, num_tokens in ((104.0, 1), (104.5, 1), (106.0, 3)):
        told.at(now).on_tokens(request, told.stats.now)
        request.output_token_ids += [7] * num_tokens
    request.finish_reason = FinishReason.STOP
    told.at(106.5).on_ended(request)
    told.stats.on_all_ended([request])
    assert {
        name: told.histogram(name)
        for name in (
            "request_queue_time_seconds", "request_prefill_time_seconds", "time_to_first_token_seconds",
            "inter_token_latency_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
            "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens",
            "request_generation_tokens", "request_params_max_tokens", "request_params_n",
            "request_max_num_generation_tokens",
        )
    } == {
        "request_queue_time_seconds": (1, 1), "request_prefill_time_seconds": (1, 3),
        "time_to_first_token_seconds": (1, 6), "inter_token_latency_seconds": (2, 2),
        "request_decode_time_seconds": (1, 2), "request_inference_time_seconds": (1, 5),
        "request_time_per_output_token_seconds": (1, 0.5), "e2e_request_latency_seconds": (1, 8.5),
        "request_prompt_tokens": (1, 6), "request_generation_tokens": (1, 5),
        "request_params_max_tokens": (1, 9), "request_params_n": (1, 1),
        "request_max_num_generation_tokens": (1, 5),
    }  # fmt: skip
    assert told.stats.counters["prefix_cache_queries"] == 6
    assert told.stats.counters["prefix_cache_hits"] == 4


def test_an_attempt_behind_a_death_has_no_first_token_of_its_own() -> None:
    told = Told()
    request = make()
    request.num_earlier_tokens = 2
    request.output_token_ids = [1, 2]
    told.at(100).on_added(request)
    told.at(101).on_admitted(request)
    told.at(102).on_tokens(request, 102)
    assert told.histogram("time_to_first_token_seconds") == (0, 0)
    assert told.histogram("request_prefill_time_seconds") == (1, 1)


def test_requests_are_counted_by_the_reason_of_their_end() -> None:
    told = Told()
    for reason in (FinishReason.STOP, FinishReason.ABORT, FinishReason.STOP):
        request = make()
        told.stats.on_added(request)
        request.finish_reason = reason
        told.stats.on_ended(request)
    told.stats.on_failed()
    ended = dict(_named(told.metrics, "request_success").values)
    assert ended == {"stop": 2, "length": 0, "abort": 1, "error": 1}
    assert told.histogram("request_decode_time_seconds") == (0, 0), "none has yielded a token"


@pytest.mark.parametrize(
    ("longest", "last"), [(1, (1,)), (9, (1, 2, 5)), (1000, (200, 500, 1000)), (8192, (1000, 2000, 5000))]
)
def test_the_bounds_of_token_counts(longest: int, last: tuple[int, ...]) -> None:
    assert token_bounds(longest)[-len(last) :] == last


def test_an_engine_measures_what_it_serves(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 512)
    rig.open_pool()
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, n=2)
    request, ready = rig.request(
        CHATS["one picture"], "a", sampling=sampling, arrived_at=time.monotonic() - 9
    )
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        rig.engine.handle(msgspec.structs.replace(embedding, sent_at=time.monotonic() - 3), rig.now)
    rig.run()
    text, _ = rig.request(CHATS["text only"], "b")
    rig.engine.handle(text, rig.now)
    rig.engine.step(rig.now)
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="b", attempt=1), rig.now)
    rig.run()
    told = {metric.name: metric for metric in rig.metrics.told()}
    counts = {name: sum(metric.counts) for name, metric in told.items() if metric.kind == "histogram"}
    assert dict(told["request_success"].values) == {"stop": 0, "length": 2, "abort": 1, "error": 0}
    assert counts["time_to_first_token_seconds"] == counts["request_prefill_time_seconds"] == 3
    assert counts["inter_token_latency_seconds"] == 2 * 4
    assert counts["e2e_request_latency_seconds"] == counts["request_queue_time_seconds"] == 3
    assert counts["request_params_n"] == 2 - 1, "of the request that ended in order"
    assert 18 < told["e2e_request_latency_seconds"].total < 60
    assert counts["stage_hand_off_seconds"] == len(ready)
    assert told["stage_hand_off_seconds"].total >= 3 * len(ready)
    assert counts["step_seconds"] == counts["iteration_tokens_total"] == rig.engine.counters["steps"]
    assert told["iteration_tokens_total"].total >= rig.engine.counters["prompt_tokens"]
    assert rig.engine.counters["generation_tokens"] == 2 * 5 + 1
    num_prompts = 2 * len(request.prompt_token_ids) // 4 + len(text.prompt_token_ids) // 4
    assert rig.engine.counters["prefix_cache_queries"] == num_prompts
    assert 0 < rig.engine.counters["prefix_cache_hits"] < len(request.prompt_token_ids) // 4
