"""The `Host` header."""

from __future__ import annotations

import pytest

from tests.workers.api.serving import endpoint, serving
from workers.api.hosts import is_loopback


def asking(*hosts: str, path: str = "/v1/models", version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/{version}", *(f"Host: {host}" for host in hosts), "", ""]).encode()


LOCAL = ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"]
FOREIGN = ["evil.example", "localhost.evil.example:8000", "192.0.2.1", "127.0.0.1.evil.example", "[::2]", ""]


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
async def test_a_server_on_a_loopback_address_knows_its_names(bound: str) -> None:
    async with serving(endpoint(host=bound)) as site:
        own = f"[{bound}]:80" if ":" in bound else f"{bound}:80"
        for host in (*LOCAL, own):
            assert (await site.ask(asking(host))).status == 200, host
        for host in FOREIGN:
            assert (await site.ask(asking(host))).error.status == 403, host


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "", "192.0.2.1"])
async def test_a_server_for_other_machines_has_any_name(bound: str) -> None:
    async with serving(endpoint(host=bound)) as site:
        assert (await site.ask(asking("any.example"))).status == 200
    async with serving(endpoint(host=bound, allowed_hosts=("Api.Example",))) as site:
        for host, status in (("api.example:80", 200), ("localhost", 200), ("any.example", 403), ("", 403)):
            assert (await site.ask(asking(host))).status == status, host


async def test_names_may_be_allowed_on_a_loopback_address() -> None:
    async with serving(endpoint(allowed_hosts=("api.example",))) as site:
        assert (await site.ask(asking("api.example"))).status == 200
        assert (await site.ask(asking("localhost"))).status == 200
        refusal = (await site.ask(asking("evil.example"))).error
        assert refusal.status == 403
        assert "--allowed-hosts" in refusal.message
    async with serving(endpoint(allowed_hosts=("*",))) as site:
        assert (await site.ask(asking("evil.example"))).status == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
async def test_health_checks_of_operators_need_no_name(path: str) -> None:
    async with serving(endpoint()) as site:
        assert (await site.ask(asking("10.0.0.7:8000", path=path))).status in (200, 503)
        assert (await site.ask(asking(path=path, version="1.0"))).status in (200, 503)


@pytest.mark.parametrize("hosts", [(), ("localhost", "localhost")], ids=["none", "two"])
async def test_one_host_is_needed(hosts: tuple[str, ...]) -> None:
    for bound in ("127.0.0.1", "0.0.0.0"):
        async with serving(endpoint(host=bound)) as site:
            assert (await site.ask(asking(*hosts))).error.status == 400


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False), ("::", False)],
)
def test_loopback_addresses(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local
