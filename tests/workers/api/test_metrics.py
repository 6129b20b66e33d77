"""What Prometheus reads."""

from __future__ import annotations

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
        counters={"steps": 7, "output_tokens": 12_345_678, "kv_blocks": 9},
        metrics=(Metric("steps", "counter", "Steps"), Metric("output_tokens", "counter", "Tokens")),
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
        "vlm_kv_blocks": "gauge", "vlm_open_requests": "gauge", "vlm_output_tokens": "unknown",
        "vlm_steps": "unknown", "vlm_worker_ready": "gauge", "vlm_worker_restarts": "unknown",
    }  # fmt: skip
    read = {
        (sample.name, sample.labels["worker"]): sample.value
        for family in families
        for sample in family.samples
        if set(sample.labels) == {"worker"}
    }
    assert read == {
        ("vlm_kv_blocks", "llm.0"): 9,
        ("vlm_worker_ready", "llm.0"): 1, ("vlm_worker_ready", "vit.1"): 0,
        ("vlm_worker_restarts", "llm.0"): 0, ("vlm_worker_restarts", "vit.1"): 2,
        ("vlm_open_requests", "llm.0"): 3, ("vlm_open_requests", "vit.1"): 0,
        ("vlm_steps", "llm.0"): 7, ("vlm_steps", "vit.1"): 2,
        ("vlm_output_tokens", "llm.0"): 12_345_678,
    }  # fmt: skip


def told(rank: int, *seconds: float) -> WorkerState:
    """A worker that counts what no other has heard of."""
    metrics = Metrics()
    metrics.gauge("toys", 'In "C:\\box",\nor not', lambda: rank)
    histogram = metrics.histogram("toy_seconds", "Seconds a toy takes", (0.25, 10.0))
    for value in seconds:
        histogram.observe(value)
    worker = WorkerId(Role.VIT, rank)
    return WorkerState(worker, 1, True, counters=metrics.values(), metrics=metrics.told())


def test_what_a_worker_declares_is_shown_as_what_it_is() -> None:
    text = exposition(WorkerCollector(lambda: [told(0, 0.25, 1.0, 11.0), told(1)])).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    toys, seconds = families["vlm_toys"], families["vlm_toy_seconds"]
    assert (toys.type, toys.documentation) == ("gauge", 'In "C:\\box",\nor not')
    assert (seconds.type, seconds.documentation) == ("histogram", "Seconds a toy takes")
    of_first = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in seconds.samples
        if sample.labels["worker"] == "vit.0"
    }
    assert of_first == {
        ("vlm_toy_seconds_bucket", "0.25"): 1, ("vlm_toy_seconds_bucket", "10"): 2,
        ("vlm_toy_seconds_bucket", "+Inf"): 3,
        ("vlm_toy_seconds_sum", None): 12.25, ("vlm_toy_seconds_count", None): 3,
    }  # fmt: skip
    assert len(seconds.samples) == 10, "a worker that has seen none has empty buckets"


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
    one = {("requests", "one"): 2, ("refused_requests", "one"): 0}
    one |= {("prompt_tokens", "one"): 2, ("output_tokens", "one"): 2}
    two = {("requests", "two"): 2, ("refused_requests", "two"): 1}
    two |= {("prompt_tokens", "two"): 1, ("output_tokens", "two"): 1}
    nobody = {("requests", ""): 1, ("refused_requests", ""): 1}
    nobody |= {("prompt_tokens", ""): 0, ("output_tokens", ""): 0}
    assert found == {"secret-1": one, "secret-2": two, "admin-secret": one | two | nobody}


def _samples(body: bytes) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(body.decode())
    samples = [sample for family in families for sample in family.samples]
    return {(one.name.removeprefix("vlm_key_"), one.labels["key"]): one.value for one in samples}
