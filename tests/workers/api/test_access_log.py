"""Request ids, and the access log."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from pipeline.config import ApiKey
from pipeline.wire.sampling import FinishReason
from tests.workers.api.serving import (
    CHAT,
    STREAMED_CHAT,
    FakeClient,
    Pieces,
    endpoint,
    get,
    piece,
    post,
    serving,
)

KEYS = (ApiKey("alice", "a"), ApiKey("bob", "b"))


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


async def test_a_request_id_comes_back_and_is_never_the_pipelines() -> None:
    client = FakeClient()
    ids = []
    async with serving(endpoint(client, named_keys=KEYS)) as site:
        for key in ("a", "b"):
            headers = (f"Authorization: Bearer {key}", "X-Request-ID: mine-1")
            answer = await site.ask(post(CHAT, *headers))
            assert answer.headers["x-request-id"] == "mine-1"
            ids.append(client.options["request_id"])
        assert ids[0] != ids[1], "two clients with the same id do not meet"
        assert "mine-1" not in ids
        for request in (get("/v1/nothing", "X-Request-Id: x"), get("/v1/models", "X-Request-Id: x")):
            headers = (await site.ask(request)).headers
            assert (headers["x-request-id"], headers["request-id"]) == ("x", "x"), "errors too"
        async with site.connect() as wire:
            await wire.send(post(STREAMED_CHAT, "Authorization: Bearer a", "X-Request-Id: y"))
            assert (await wire.head())[1]["x-request-id"] == "y"


@pytest.mark.parametrize("given", ["x" * 129, "a b", "\xb5", "", "a\tb"])
async def test_a_strange_request_id_is_replaced(given: str) -> None:
    async with serving(endpoint()) as site:
        made = {
            (await site.ask(get("/v1/models", f"X-Request-Id: {given}"))).headers["x-request-id"]
            for _ in range(2)
        }
        assert len(made) == 2
        assert all(one.startswith("req_") and one != given for one in made)


async def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    server = endpoint(FakeClient(), named_keys=KEYS, access_log="json")
    async with serving(server) as site:
        headers = ("Authorization: Bearer a", "X-Request-Id: r1")
        await site.ask(post(CHAT, *headers, path="/v1/chat/completions?token=secret"))
        async with site.connect() as wire:
            await wire.send(post(STREAMED_CHAT, *headers, "Connection: close"))
            await wire.rest()
        await site.ask(post(CHAT))
        await site.ask(get("/%0aforged", *headers))
    whole, stream, refused, missing = lines(capsys)
    assert whole.items() >= {
        "request_id": "r1", "key": "alice", "method": "POST", "path": "/v1/chat/completions", "status": 200,
        "prompt_tokens": 1, "output_tokens": 1, "peer": "127.0.0.1",
    }.items()  # fmt: skip
    assert whole["completion_id"].startswith("chatcmpl-")
    assert whole["ms"] >= 0
    assert "T" in whole["time"]
    assert "ttft_ms" not in whole
    assert 0 <= stream["ttft_ms"] <= stream["ms"]
    assert (refused["status"], "key" in refused, "prompt_tokens" in refused) == (401, False, False)
    assert (missing["status"], missing["path"]) == (404, "/%0aforged")
    assert "Hello" not in str((whole, stream, refused)), "never contents"


async def test_a_line_of_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "workers.api.access_log")
    async with serving(endpoint(access_log="text")) as site:
        await site.ask(post(CHAT, "X-Request-Id: r1"))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "workers.api.access_log"]
    assert line.startswith("POST /v1/chat/completions 200 ")
    assert " request_id=r1 " in line
    assert line.endswith("prompt_tokens=1 output_tokens=1")


async def test_without_the_option_nothing_is_written(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(endpoint()) as site:
        await site.ask(post(CHAT))
    assert capsys.readouterr().err == ""
    assert not caplog.records


async def test_a_client_that_leaves_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    async def answer() -> Pieces:
        await asyncio.Event().wait()
        yield piece("", FinishReason.STOP)

    server = endpoint(FakeClient(answer), access_log="json")
    async with serving(server) as site:
        async with site.connect() as wire:
            await wire.send(post(CHAT))
            while not server.num_unfinished:
                await asyncio.sleep(0.01)
        while server.num_handled:
            await asyncio.sleep(0.01)
    assert lines(capsys)[0]["status"] == 499
