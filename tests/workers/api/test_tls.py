"""The endpoint over TLS."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ApiConfig
from pipeline.config.tls import ssl_context
from tests.workers.api.serving import STREAMED_CHAT, Site, Wire, endpoint, get, post, serving
from workers.api.connections import Patience

# A key, and a certificate of localhost that it has signed itself, until 2120.
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg1ajbtctYTRGMXVgW
alS3iXhgMaCB/B7y9OiOGcnRdoChRANCAAQGo1FuwQKkLRXGoYLDA86zaauwJgUF
NQNr7sB9aJ7jbyBJfExrMu2gEYlGaMCqGMZ+F1TH7cNDC5+en+hS68uD
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBZjCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABAajUW7BAqQtFcah
gsMDzrNpq7AmBQU1A2vuwH1onuNvIEl8TGsy7aARiUZowKoYxn4XVMftw0MLn56f
6FLry4OjTjBMMA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFJWYyvQ27zPvePoN
lb3NXOQB5bmQMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQD
AgNHADBEAiAh0h9iQeDuc+9yU4hhjxm3ca4dSyOpnYDYZkbP8koULQIgKNYRG1xl
oO/1JMcUT3i+q65b7xdy0RD4G7/4/zJf9BM=
-----END CERTIFICATE-----
"""


@pytest.fixture
def pem(tmp_path: Path) -> str:
    path = tmp_path / "both.pem"
    path.write_text(PEM)
    return str(path)


async def connected(site: Site, pem: str, *, has_certificate: bool = False) -> Wire:
    context = ssl.create_default_context(cafile=pem)
    if has_certificate:
        context.load_cert_chain(pem)
    opened = await asyncio.open_connection(site.host, site.port, ssl=context, server_hostname="localhost")
    return Wire(*opened)


async def test_requests_and_streams_over_tls(pem: str) -> None:
    async with serving(endpoint(), tls=ssl_context(ApiConfig(ssl_certfile=pem))) as site:
        wire = await connected(site, pem)
        await wire.send(get("/v1/models"))
        assert (await wire.answer()).status == 200
        await wire.send(post(STREAMED_CHAT, "Connection: close"))
        assert (await wire.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        wire.writer.close()


async def slow(wire: Wire) -> None:
    await wire.send(b"GET /v1")


async def wrong(wire: Wire) -> None:
    await wire.send(b"no HTTP\r\n\r\n")


@pytest.mark.parametrize(("mistake", "status"), [(slow, 408), (wrong, 400)])
async def test_mistakes_over_tls_are_answered(
    pem: str, mistake: Callable[[Wire], object], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """TLS has no half-closed connections."""
    patience = Patience(head_s=0.3, idle_s=0.3, reading_s=0.5, closing_s=0.5)
    tls = ssl_context(ApiConfig(ssl_certfile=pem))
    async with serving(endpoint(), tls=tls, patience=patience) as site:
        wire = await connected(site, pem)
        await mistake(wire)  # type: ignore[misc]
        assert (await wire.answer()).error.status == status
        await wire.rest()
        wire.writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_plain_http_at_a_port_of_tls_leaves_no_traceback(
    pem: str, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ssl_context(ApiConfig(ssl_certfile=pem))
    async with serving(endpoint(), tls=tls) as site, site.connect() as wire:
        await wire.send(get("/v1/models"))
        assert b"HTTP" not in await wire.rest()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_clients_need_a_certificate_where_authorities_are_given(pem: str) -> None:
    config = ApiConfig(ssl_certfile=pem, ssl_keyfile=pem, ssl_ca_certs=pem)
    async with serving(endpoint(), tls=ssl_context(config)) as site:
        wire = await connected(site, pem, has_certificate=True)
        await wire.send(get("/v1/models"))
        assert (await wire.answer()).status == 200
        wire.writer.close()
        wire = await connected(site, pem)
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await wire.answer()  # the handshake fails behind the client's back (TLS 1.3)
        wire.writer.close()


@pytest.mark.parametrize("option", ["ssl_certfile", "ssl_keyfile", "ssl_ca_certs"])
@pytest.mark.parametrize("text", [None, "", "no PEM"])
def test_a_file_that_cannot_be_used_is_named(pem: str, tmp_path: Path, option: str, text: str | None) -> None:
    path = tmp_path / "bad"
    if text is not None:
        path.write_text(text)
    files = {"ssl_certfile": pem, "ssl_keyfile": pem, option: str(path)}
    with pytest.raises(ValueError, match=f"{option}.*{path}"):
        ssl_context(ApiConfig(**files))


def test_a_key_needs_its_certificate() -> None:
    assert ssl_context(ApiConfig()) is None
    with pytest.raises(ValueError, match="ssl_keyfile needs ssl_certfile"):
        ApiConfig(ssl_keyfile="key")
