"""Who an HTTP request counts for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pipeline.client.client import Piece
from pipeline.config import ApiConfig, ApiKey
from pipeline.wire.sampling import FinishReason
from workers.api.server import ApiServer
from workers.api.tenants import peer_tenant


@pytest.mark.parametrize(
    ("remote", "forwarded", "tenant"),
    [
        ("192.0.2.7", [], "peer:192.0.2.7"),
        ("::ffff:192.0.2.7", [], "peer:192.0.2.7"),
        ("2001:db8::1", [], "peer:2001:db8::/64"),
        ("2001:db8::ffff:1", [], "peer:2001:db8::/64"),
        ("fe80::1%eth0", [], "peer:fe80::/64"),
        (None, [], "peer:local"),
        ("10.0.0.1", ["1.1.1.1, 192.0.2.9"], "peer:192.0.2.9"),
        ("10.0.0.1", ["1.1.1.1", "2.2.2.2,192.0.2.9:4711"], "peer:192.0.2.9"),
        ("10.0.0.1", ["[2001:db8::1]:80"], "peer:2001:db8::/64"),
        ("10.0.0.1", ["unknown"], "peer:10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, "], "peer:10.0.0.1"),
    ],
)
def test_a_client_without_a_key_is_its_address(remote: str | None, forwarded: list[str], tenant: str) -> None:
    assert peer_tenant(remote, forwarded) == tenant


class FakeClient:
    failure, is_draining, welcome = "", False, SimpleNamespace(max_model_len=9)

    def __init__(self) -> None:
        self.tenants: list[str] = []

    async def generate(self, *_: Any, tenant: str = "", **__: Any) -> Any:
        self.tenants.append(tenant)
        yield Piece("Hi", (1,), FinishReason.STOP, 1, 1)

    def token_text(self, token_id: int) -> bytes:
        return b"x"


@pytest.mark.parametrize(
    ("options", "tenant"),
    [
        ({}, "peer:127.0.0.1"),
        ({"trust_forwarded_for": True}, "peer:192.0.2.9"),
        ({"trust_forwarded_for": True, "api_key": ("secret",)}, f"key:{ApiKey.unnamed('secret').name}"),
    ],
)
async def test_the_endpoint_says_on_whose_behalf_it_asks(options: dict[str, Any], tenant: str) -> None:
    client = FakeClient()
    server = ApiServer(
        ApiConfig(**options),
        cast(Any, client),
        ("m",),
        cast(
            Any,
            SimpleNamespace(default_sampling={}),
        ),
    )
    server.set_ready()
    headers = {"Authorization": "Bearer secret", "X-Forwarded-For": "1.1.1.1, 192.0.2.9"}
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    async with TestClient(TestServer(server.application())) as http:
        assert (await http.post("/v1/chat/completions", json=body, headers=headers)).status == 200
    assert client.tenants == [tenant]
