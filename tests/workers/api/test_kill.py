"""`POST /admin/kill`, without a launcher."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pipeline.wire.control import WorkerState
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, VIT_0
from tests.workers.api.serving import Answer, FakeClient, Site, endpoint, post, serving
from workers.api import kill as module
from workers.api.launcher_requests import LauncherRequests
from workers.api.server import ApiServer

API = WorkerId(Role.API)
ADMIN = "Authorization: Bearer secret"


class Killer:
    """A launcher that replaces whom it is asked to kill."""

    def __init__(self, does_answer: bool = True) -> None:
        self.killed: list[WorkerId] = []
        self.client = FakeClient()
        self.client.workers = (
            WorkerState(LLM_0, 1, True), WorkerState(VIT_0, 4, True), WorkerState(API, 1, True),
            WorkerState(WorkerId(Role.PREPROCESS), 1, False),
        )  # fmt: skip
        self._does_answer = does_answer

    def kill(self, worker: WorkerId) -> None:
        self.killed.append(worker)
        if self._does_answer:
            self.client.workers = tuple(
                WorkerState(one.worker, one.epoch + (one.worker == worker), one.worker != worker)
                for one in self.client.workers
            )

    def server(self, **options: Any) -> ApiServer:
        return endpoint(
            self.client, launcher=LauncherRequests(kill=self.kill), **{"admin_key": "secret", **options}
        )


async def ask(site: Site, body: Any, *headers: str) -> Answer:
    return await site.ask(post(json.dumps(body).encode(), *(headers or (ADMIN,)), path="/admin/kill"))


async def test_a_worker_is_killed_once_its_death_is_known() -> None:
    killer = Killer()
    async with serving(killer.server()) as site:
        answer = await ask(site, {"worker": "vit.0"})
    assert answer.status == 202
    assert json.loads(answer.body) == {"status": "killed", "worker": "vit.0", "epoch": 4}
    assert killer.killed == [VIT_0]


@pytest.mark.parametrize("header", ["X-Nothing: here", "Authorization: Bearer of-alice"])
async def test_only_with_the_admin_key(header: str) -> None:
    killer = Killer()
    async with serving(killer.server(api_key=("of-alice",))) as site:
        assert (await ask(site, {"worker": "vit.0"}, header)).status == 401
    assert killer.killed == []


async def test_without_an_admin_key_there_is_no_such_route() -> None:
    killer = Killer()
    async with serving(killer.server(admin_key="")) as site:
        assert (await ask(site, {"worker": "vit.0"})).status == 401
    assert killer.killed == []


@pytest.mark.parametrize(
    ("worker", "status", "words"),
    [
        ("vit.7", 404, "there is no worker 'vit.7'; there are: llm.0, vit.0, api.0, preprocess.0"),
        ("launcher.0", 404, "there is no worker 'launcher.0'"),
        ("", 404, "there is no worker ''"),
        ("preprocess.0", 409, "preprocess.0 is starting"),
    ],
)
async def test_who_cannot_be_killed(worker: str, status: int, words: str) -> None:
    killer = Killer()
    async with serving(killer.server()) as site:
        error = (await ask(site, {"worker": worker})).error
    assert (error.status, error.field) == (status, "worker")
    assert error.message.startswith(words)
    assert killer.killed == []


@pytest.mark.parametrize("body", [{}, [], {"worker": 3}, {"worker": "vit.0", "force": True}])
async def test_a_body_that_says_something_else_is_a_400(body: Any) -> None:
    killer = Killer()
    async with serving(killer.server()) as site:
        assert (await ask(site, body)).error.status == 400
    assert killer.killed == []


async def test_a_launcher_that_does_not_answer_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADMIN_ANSWER_S", 0.1)
    killer = Killer(does_answer=False)
    async with serving(killer.server()) as site:
        assert (await ask(site, {"worker": "vit.0"})).error.status == 503
    assert killer.killed == [VIT_0]


async def test_the_endpoint_answers_before_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWERED_S", 2.0)
    killer = Killer()
    async with serving(killer.server()) as site:
        assert (await ask(site, {"worker": "api.0"})).status == 202
        assert killer.killed == []
        async with asyncio.timeout(20):
            while killer.killed != [API]:
                await asyncio.sleep(0.05)
