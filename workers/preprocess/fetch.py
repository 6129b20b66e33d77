"""Brings media in: URLs, local files, base64. Everything from outside is hostile.

One URL parser, and exactly what it parsed is fetched. Names are resolved once, by us; addresses that are not public are
refused unless an option allows them; each redirect is checked like the first URL. Sizes are limited while reading.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from pipeline.config import MIB, PreprocessConfig
from pipeline.errors import RequestError

MAX_REDIRECTS = 3
MAX_CONCURRENT_DOWNLOADS = 32
CHUNK_BYTES = 1 << 16
IPV6_UNICAST = ipaddress.ip_network("2000::/3")


class _BlockedAddress(OSError):
    pass


class _PublicResolver(AbstractResolver):
    """Resolves a name once and keeps public addresses only; the connection goes to exactly those."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        public = [result for result in found if is_public(result["host"])]
        if not public:
            raise _BlockedAddress("not a public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()


def is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in IPV6_UNICAST or ip.sixtofour is not None or ip.teredo is not None:
            return False  # forms that carry an IPv4 address lead wherever a gateway takes them
    return ip.is_global and not ip.is_multicast


@dataclass
class _Download:
    task: asyncio.Task[bytes]
    num_waiting: int = 0


class Fetcher:
    """Use within one event loop; `close` it at the end."""

    def __init__(self, config: PreprocessConfig) -> None:
        self._config = config
        self._max_bytes = config.max_media_mib * MIB
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_DOWNLOADS)
        self._session: aiohttp.ClientSession | None = None
        self._downloads: dict[URL, _Download] = {}

    async def fetch(self, url: str, field: str) -> bytes:
        """The bytes behind an http, https or file URL or a bare path. Raises RequestError, which names the field."""
        if url.startswith("/"):
            return await asyncio.to_thread(self._read_file, url, field)
        try:
            parsed = URL(url)
        except ValueError:
            raise RequestError("the URL cannot be understood", field=field) from None
        match parsed.scheme:
            case "file":
                return await asyncio.to_thread(self._read_file, parsed.path, field)
            case "http" | "https":
                return await self._share(parsed, field)
            case _:
                raise RequestError("a media URL must begin with http://, https://, data: or file://", field=field)

    def _read_file(self, path: str, field: str) -> bytes:
        """Judges the path, and again what was opened, so that nothing can be put in its place meanwhile."""
        root = self._config.allowed_local_media_path
        if not root:
            raise RequestError("local files are not allowed here (the server's option --allowed-local-media-path)", field=field)
        refusal = RequestError("the file cannot be read, or lies outside the allowed folder", field=field)
        allowed = Path(root).resolve()
        try:
            if not Path(path).resolve().is_relative_to(allowed):
                raise refusal
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError, RuntimeError):
            raise refusal from None
        try:
            info = os.fstat(fd)
            if not Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(allowed) or not stat.S_ISREG(info.st_mode):
                raise refusal
            if info.st_size > self._max_bytes:
                raise self._too_large(field)
            with open(fd, "rb", closefd=False) as file:
                return file.read(self._max_bytes)
        finally:
            os.close(fd)

    async def _share(self, url: URL, field: str) -> bytes:
        """Downloads a URL once for all who want it at the same time, like the `n` choices of one request."""
        download = self._downloads.get(url)
        if download is None:
            download = self._downloads[url] = _Download(asyncio.create_task(self._download(url, field)))
        download.num_waiting += 1
        try:
            return await asyncio.shield(download.task)
        except RequestError as error:
            raise RequestError(error.info.message, field=field, status=error.info.status) from None
        finally:
            download.num_waiting -= 1
            if download.task.done() or not download.num_waiting:
                download.task.cancel()
                if self._downloads.get(url) is download:  # nobody may join what is over
                    del self._downloads[url]

    async def _download(self, url: URL, field: str) -> bytes:
        async with self._slots:
            try:
                async with asyncio.timeout(self._config.media_timeout_s):
                    for _ in range(MAX_REDIRECTS + 1):
                        self._check_host(url, field)
                        result = await self._get(url, field)
                        if isinstance(result, bytes):
                            return result
                        url = result
            except TimeoutError:
                raise RequestError(f"the media did not come within {self._config.media_timeout_s:.0f} s", field=field) from None
            except (aiohttp.ClientError, OSError, ValueError):
                raise RequestError("the media's host cannot be reached", field=field) from None
        raise RequestError(f"the media URL redirects more than {MAX_REDIRECTS} times", field=field)

    async def _get(self, url: URL, field: str) -> bytes | URL:
        """The body, or where a redirect leads."""
        async with self._client().get(url, allow_redirects=False) as response:
            if response.status in (301, 302, 303, 307, 308):
                target = url.join(URL(response.headers.get("Location", "")))
                if target.scheme not in ("http", "https"):
                    raise RequestError("the media URL redirects to something that is neither http nor https", field=field)
                return target
            if response.status != 200:
                raise RequestError(f"the media's host answered with status {response.status}", field=field)
            if (response.content_length or 0) > self._max_bytes:
                raise self._too_large(field)
            data = bytearray()
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                data += chunk
                if len(data) > self._max_bytes:
                    raise self._too_large(field)
            return bytes(data)

    def _check_host(self, url: URL, field: str) -> None:
        host = url.host or ""
        allowed = self._config.allowed_media_domains
        if not host or (allowed and host not in allowed):
            raise RequestError("the media's host is not among the allowed ones", field=field)
        if self._config.allow_private_media:
            return
        # A name is judged by the resolver. What ends in a number is an address, in one of many spellings (2130706433, 127.1, 0x7f.1)
        # that some clients do not even resolve: only the canonical one is let through, and judged here.
        last = (url.raw_host or "").rstrip(".").rpartition(".")[2].lower()
        if (last.isdigit() or last.startswith("0x") or ":" in host) and not is_public(host):
            raise RequestError("the media's host cannot be reached", field=field)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = None if self._config.allow_private_media else _PublicResolver()
            # No proxy settings, cookies or compression: what the URL says is fetched, and its size is the size on the wire.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver), cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": "vlm-pipeline"},
            )  # fmt: skip
        return self._session

    def _too_large(self, field: str) -> RequestError:
        return RequestError(f"the media is larger than {self._config.max_media_mib} MiB", field=field, status=413)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def decode_base64(data: bytes | memoryview, max_bytes: int, field: str) -> bytes:
    """Strict base64, with or without padding. Raises RequestError when it is broken or decodes to more than `max_bytes`."""
    if len(data) * 3 // 4 > max_bytes + 3:
        raise RequestError(f"the media is larger than {max_bytes // MIB} MiB", field=field, status=413)
    try:
        return binascii.a2b_base64(bytes(data) + b"=" * (-len(data) % 4), strict_mode=True)
    except binascii.Error:
        raise RequestError("the base64 data of the media is broken", field=field) from None
