"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pipeline.wire.messages import WorkerState
from pipeline.wire.topology import Role, WorkerId
from tests.workers.api.serving import FakeClient, endpoint, get, serving

WORKERS = (
    WorkerState(
        worker=WorkerId(Role.LLM, 0), epoch=1, is_ready=True, num_open_requests=3,
        counters={"steps": 7, "output_tokens": 12_345_678},
    ),
    WorkerState(
        worker=WorkerId(Role.VIT, 1), epoch=3, is_ready=False, num_open_requests=0,
        counters={"steps": 2},
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
    assert {family.type for family in families} == {"gauge"}
    read = {
        (sample.name, sample.labels["worker"]): sample.value
        for family in families
        for sample in family.samples
        if set(sample.labels) == {"worker"}
    }
    assert read == {
        ("vlm_worker_ready", "llm.0"): 1, ("vlm_worker_ready", "vit.1"): 0,
        ("vlm_worker_restarts", "llm.0"): 0, ("vlm_worker_restarts", "vit.1"): 2,
        ("vlm_open_requests", "llm.0"): 3, ("vlm_open_requests", "vit.1"): 0,
        ("vlm_steps", "llm.0"): 7, ("vlm_steps", "vit.1"): 2,
        ("vlm_output_tokens", "llm.0"): 12_345_678,
    }  # fmt: skip
