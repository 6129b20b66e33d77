"""What Prometheus reads."""

from __future__ import annotations

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import ApiKey
from pipeline.process.metrics import Metrics
from pipeline.wire.control import WorkerState
from pipeline.wire.metrics import Metric
from pipeline.wire.topology import Role, WorkerId
from tests.workers.api.serving import CHAT, FakeClient, endpoint, get, post, serving
from workers.api.metrics import WorkerCollector, exposition

WORKERS = (
    WorkerState(
        worker=WorkerId(Role.LLM, 0), epoch=1, is_ready=True, num_open_requests=3,
        counters={"steps": 7, "generation_tokens": 12_345_678, "kv_blocks": 9},
        metrics=(Metric("steps", "counter", "Steps"), Metric("generation_tokens", "counter", "Tokens")),
    ),
    WorkerState(
        worker=WorkerId(Role.VIT, 1), epoch=3, is_ready=False, num_open_requests=0,
        counters={"steps": 2}, metrics=(Metric("steps", "counter", "Steps"),),
    ),
)  # fmt: skip


async def test_every_count_of_every_worker_is_exposed() -> None:
    client = FakeClient()
    server = endpoint(client)
    async with serving(server) as site:
        assert (await site.ask(get("/metrics"))).body == b"", "no worker is known yet"
        client.workers = WORKERS
        answer = await site.ask(get("/metrics"))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.body.decode()))
    assert {family.name: family.type for family in families} == {
        "vlm_kv_blocks": "gauge", "vlm_open_requests": "gauge", "vlm_generation_tokens": "counter",
        "vlm_steps": "counter", "vlm_worker_ready": "gauge", "vlm_worker_restarts": "counter",
    }  # fmt: skip
    read = {
        (sample.name, sample.labels["worker"]): sample.value
        for family in families
        for sample in family.samples
    }
    assert read == {
        ("vlm_kv_blocks", "llm.0"): 9,
        ("vlm_worker_ready", "llm.0"): 1, ("vlm_worker_ready", "vit.1"): 0,
        ("vlm_worker_restarts_total", "llm.0"): 0, ("vlm_worker_restarts_total", "vit.1"): 2,
        ("vlm_open_requests", "llm.0"): 3, ("vlm_open_requests", "vit.1"): 0,
        ("vlm_steps_total", "llm.0"): 7, ("vlm_steps_total", "vit.1"): 2,
        ("vlm_generation_tokens_total", "llm.0"): 12_345_678,
    }  # fmt: skip


def told(rank: int, *seconds: float) -> WorkerState:
    """A worker that counts what no other has heard of."""
    metrics = Metrics()
    metrics.gauge("toys", 'In "C:\\box",\nor not', lambda: rank)
    histogram = metrics.histogram("toy_seconds", "Seconds a toy takes", (0.25, 10))
    metrics.labelled("toy_colors", "Colors", "color", lambda: {"red": 1, "blue": rank})
    for value in seconds:
        histogram.observe(value)
    worker = WorkerId(Role.VIT, rank)
    return WorkerState(worker, 1, True, counters=metrics.values(), metrics=metrics.told())


def test_what_a_worker_declares_is_shown_as_what_it_is() -> None:
    collector = WorkerCollector(lambda: [told(0, 0.25, 1.0, 11.0), told(1)], lambda: (0,), "model")
    text = exposition(collector).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    toys, seconds, colors = families["vlm_toys"], families["vlm_toy_seconds"], families["vlm_toy_colors"]
    assert (toys.type, toys.documentation) == ("gauge", 'In "C:\\box",\nor not')
    assert (seconds.type, seconds.documentation) == ("histogram", "Seconds a toy takes")
    of_first = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in seconds.samples
        if sample.labels["worker"] == "vit.0"
    }
    assert of_first == {
        ("vlm_toy_seconds_bucket", "0.25"): 1, ("vlm_toy_seconds_bucket", "10.0"): 2,
        ("vlm_toy_seconds_bucket", "+Inf"): 3,
        ("vlm_toy_seconds_sum", None): 12.25, ("vlm_toy_seconds_count", None): 3,
    }  # fmt: skip
    assert len(seconds.samples) == 10, "a worker that has seen none has empty buckets"
    assert {(one.labels["worker"], one.labels["color"]): one.value for one in colors.samples} == {
        ("vit.0", "red"): 1, ("vit.0", "blue"): 0, ("vit.1", "red"): 1, ("vit.1", "blue"): 1
    }  # fmt: skip


def lead(rank: int, num_tokens: int, *seconds: float) -> WorkerState:
    metrics = Metrics()
    metrics.counter("generation_tokens", "Tokens", lambda: num_tokens)
    metrics.gauge("free_blocks", "Blocks", lambda: 3)
    metrics.labelled("request_success", "Ended", "finished_reason", lambda: {"stop": rank, "length": 1})
    ttft = metrics.histogram("time_to_first_token_seconds", "TTFT", (0.5,))
    for value in seconds:
        ttft.observe(value)
    worker = WorkerId(Role.LLM, rank)
    return WorkerState(worker, 1, True, counters=metrics.values(), metrics=metrics.told())


def vit(rank: int, num_hits: int, epoch: int = 1) -> WorkerState:
    metrics = Metrics()
    metrics.counter("mm_cache_hits", "Hits", lambda: num_hits)
    worker = WorkerId(Role.VIT, rank)
    return WorkerState(worker, epoch, True, counters=metrics.values(), metrics=metrics.told())


def test_by_an_option_the_metrics_of_vllm_have_its_names_and_labels() -> None:
    workers = [lead(0, 5, 0.1), lead(2, 7, 0.2, 3.0), vit(0, 10), vit(1, 20)]

    def samples(has_vllm_names: bool) -> dict[tuple[str, ...], float]:
        text = exposition(WorkerCollector(lambda: workers, lambda: (0, 2), "m", has_vllm_names)).decode()
        every = [one for family in text_string_to_metric_families(text) for one in family.samples]
        return {
            (one.name, *(f"{key}={one.labels[key]}" for key in sorted(one.labels))): one.value
            for one in every
        }

    ours, both = samples(False), samples(True)
    assert ours["vlm_generation_tokens_total", "engine=1", "model_name=m", "worker=llm.2"] == 7
    assert ours["vlm_mm_cache_hits_total", "engine=0", "model_name=m", "worker=vit.1"] == 20
    assert ours["vlm_free_blocks", "worker=llm.2"] == 3
    theirs = {key: value for key, value in both.items() if key[0].startswith("vllm:")}
    assert {key: value for key, value in both.items() if key not in theirs} == ours
    of_engines = {
        f"engine={engine}": {
            ("vllm:generation_tokens_total", ()): num_tokens,
            ("vllm:request_success_total", ("finished_reason=stop",)): num_stopped,
            ("vllm:request_success_total", ("finished_reason=length",)): 1,
            ("vllm:time_to_first_token_seconds_bucket", ("le=0.5",)): 1,
            ("vllm:time_to_first_token_seconds_bucket", ("le=+Inf",)): num_first,
            ("vllm:time_to_first_token_seconds_count", ()): num_first,
            ("vllm:time_to_first_token_seconds_sum", ()): total,
        }
        for engine, num_tokens, num_stopped, num_first, total in ((0, 5, 0, 1, 0.1), (1, 7, 2, 2, 3.2))
    }  # fmt: skip
    of_engines["engine=0"]["vllm:mm_cache_hits_total", ()] = 30
    expected = {
        (name, *sorted((engine, *more, "model_name=m"))): value
        for engine, found in of_engines.items()
        for (name, more), value in found.items()
    }
    assert theirs == expected


def test_a_sum_over_workers_does_not_fall_when_one_of_them_is_replaced() -> None:
    dead = WorkerState(WorkerId(Role.VIT, 0), 2, False)
    turns = (
        ([lead(0, 5, 0.1), vit(0, 10), vit(1, 20)], 30, 1),
        ([lead(0, 5, 0.1), dead, vit(1, 21)], 31, 1),
        ([lead(0, 5, 0.1, 2.0), vit(0, 1, epoch=2), vit(1, 21)], 32, 2),
        ([replace(lead(0, 5, 0.3), epoch=2), vit(0, 2, epoch=3), vit(1, 21)], 34, 3),
    )
    now: list[WorkerState] = []
    collector = WorkerCollector(lambda: now, lambda: (0,), "m", has_vllm_names=True)
    for states, num_hits, num_first in turns:
        now[:] = states
        for _ in range(2):  # however often it is read
            text = exposition(collector).decode()
            of = 'engine="0",model_name="m"'
            assert f"vllm:mm_cache_hits_total{{{of}}} {num_hits}.0" in text
            assert f"vllm:time_to_first_token_seconds_count{{{of}}} {num_first}.0" in text
    assert f"vllm:time_to_first_token_seconds_sum{{{of}}} 2.4" in text


def test_a_group_keeps_its_number_while_another_one_starts() -> None:
    starting = WorkerState(WorkerId(Role.LLM, 0), 2, False)
    text = exposition(WorkerCollector(lambda: [starting, lead(2, 7)], lambda: (0, 2), "m")).decode()
    assert 'vlm_generation_tokens_total{engine="1",model_name="m",worker="llm.2"} 7.0' in text


async def test_what_keys_have_asked_for_is_seen_by_their_owner_and_by_the_operator() -> None:
    keys = (ApiKey("one", "secret-1"), ApiKey("one", "secret-1b"), ApiKey("two", "secret-2"))
    server = endpoint(named_keys=keys, admin_key="admin-secret")

    def as_key(key: str) -> str:
        return f"Authorization: Bearer {key}"

    async with serving(server) as site:
        for key in ("secret-1", "secret-1b", "secret-2", "wrong"):
            await site.ask(post(CHAT, as_key(key)))
        assert (await site.ask(post(b"{}", as_key("secret-2")))).status == 400
        await site.ask(get("/v1/models", as_key("secret-2")))  # no question to the model
        assert (await site.ask(get("/metrics"))).status == 401
        found = {
            key: _samples((await site.ask(get("/metrics", as_key(key)))).body)
            for key in ("secret-1", "secret-2", "admin-secret")
        }
    ttft, e2e = "time_to_first_token_seconds", "e2e_request_latency_seconds"
    for key, count in (
        ("secret-1", {"one": 2}),
        ("secret-2", {"two": 1}),
        ("admin-secret", {"one": 2, "two": 1, "": 0}),
    ):
        for name in (ttft, e2e):
            counted = {who: num for (what, who), num in found[key].items() if what == f"{name}_count"}
            assert counted == count, "only answers that begin are measured"
    found = {
        key: {name: value for name, value in of_key.items() if "seconds" not in name[0]}
        for key, of_key in found.items()
    }
    one = {("requests", "one"): 2, ("refused_requests", "one"): 0}
    one |= {("prompt_tokens", "one"): 2, ("generation_tokens", "one"): 2}
    two = {("requests", "two"): 2, ("refused_requests", "two"): 1}
    two |= {("prompt_tokens", "two"): 1, ("generation_tokens", "two"): 1}
    nobody = {("requests", ""): 1, ("refused_requests", ""): 1}
    nobody |= {("prompt_tokens", ""): 0, ("generation_tokens", ""): 0}
    assert found == {"secret-1": one, "secret-2": two, "admin-secret": one | two | nobody}


def _samples(body: bytes) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(body.decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        (one.name.removeprefix("vlm_key_").removesuffix("_total"), one.labels["key"]): one.value
        for one in samples
    }
