"""Brings media in: URLs, local files, base64. Everything from outside is hostile.

One URL parser, and exactly what it parsed is fetched. Names are resolved once, by us; addresses that are not public are
refused unless an option allows them; each redirect is checked like the first URL. Sizes are limited while reading.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar, cast

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from pipeline.config import MIB, PreprocessConfig
from pipeline.data_urls import forgiving_base64
from pipeline.errors import RequestError
from workers.preprocess.videos import VideoFile

D = TypeVar("D")
MAX_REDIRECTS = 3
MAX_CONCURRENT_DOWNLOADS = 32
CHUNK_BYTES = 1 << 16
MAX_URL = 1 << 16  # characters
NO_URL = (
    # Two sentences: what a URL is, and the commonest mistake.
    "a media URL must begin with http://, https://, data: or file://; base64 alone is none: it goes behind data:image/png;base64, or the like"
)
WRITE_BYTES = 1 << 20  # to a file, at once, by a thread
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


class Validators(NamedTuple):
    """What a host said of a version of its content, to be asked later whether it still is the one."""

    etag: str
    last_modified: str

    @property
    def headers(self) -> dict[str, str]:
        return {"If-None-Match": self.etag} if self.etag else {"If-Modified-Since": self.last_modified}


class Fetched(NamedTuple, Generic[D]):
    """`data` is None when the content is still that of the validators with which it was asked for."""

    data: D | None
    validators: Validators | None  # None: the host cannot tell versions apart


@dataclass
class _Download:
    task: asyncio.Task[Any]
    num_waiting: int = 0


class _Memory:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._data = bytearray()

    async def write(self, data: bytes) -> None:
        self._data += data

    async def end(self) -> bytes:
        return bytes(self._data)

    def close(self) -> None:
        pass


class _TemporaryFile:
    """On disk, without a name: nothing is left of it, however this process ends."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  `close` does
        self._digest = hashlib.sha256()
        self._pending = bytearray()

    async def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self._flush()

    async def end(self) -> VideoFile:
        await self._flush()
        with self._file:
            self._file.flush()
            return VideoFile(os.dup(self._file.fileno()), self._file.tell(), self._digest.digest())

    def close(self) -> None:
        self._file.close()

    async def _flush(self) -> None:
        data, self._pending = self._pending, bytearray()
        await asyncio.to_thread(self._file.write, data)
        await asyncio.to_thread(self._digest.update, data)


class Fetcher:
    """Use within one event loop; `close` it at the end."""

    def __init__(self, config: PreprocessConfig) -> None:
        self._config = config
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_DOWNLOADS)
        self._session: aiohttp.ClientSession | None = None
        self._downloads: dict[tuple[object, ...], _Download] = {}

    async def fetch(self, url: str, field: str, validators: Validators | None = None) -> Fetched[bytes]:
        """The bytes behind an http, https or file URL or a bare path, unless `validators` still hold.

        Raises RequestError, which names the field.
        """
        return await self._fetch(url, field, validators, _Memory, self._config.max_media_mib * MIB, _read_all)

    async def fetch_file(self, url: str, field: str, validators: Validators | None = None) -> Fetched[VideoFile]:
        """The same, on disk. A local file is not copied."""
        return await self._fetch(url, field, validators, _TemporaryFile, self._config.max_video_mib * MIB, _as_video_file)

    async def _fetch(
        self, url: str, field: str, validators: Validators | None, body: Callable[[int], Any], max_bytes: int, open_file: Callable[[int, int], D]
    ) -> Fetched[D]:
        def read_file(path: str) -> Fetched[D]:
            return Fetched(self._read_file(path, field, max_bytes, open_file), None)

        check_form(url, field)
        if url.startswith("/"):
            return await asyncio.to_thread(read_file, url)
        try:
            parsed = URL(url)
        except ValueError:
            raise RequestError("the URL cannot be understood", field=field) from None
        match parsed.scheme:
            case "file":
                return await asyncio.to_thread(read_file, parsed.path)
            case "http" | "https":
                return await self._share(
                    (parsed, validators, body), lambda: self._download(parsed, field, validators, partial(body, max_bytes)), field
                )
            case _:
                raise RequestError(NO_URL, field=field)

    def _read_file(self, path: str, field: str, max_bytes: int, open_file: Callable[[int, int], D]) -> D:
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
            if info.st_size > max_bytes:
                raise too_large(max_bytes, field)
            return open_file(fd, max_bytes)
        finally:
            os.close(fd)

    async def _share(self, key: tuple[object, ...], download_it: Callable[[], Coroutine[Any, Any, Fetched[D]]], field: str) -> Fetched[D]:
        """Downloads a URL once for all who want it at the same time, like the `n` choices of one request."""
        download = self._downloads.get(key)
        if download is None:
            download = self._downloads[key] = _Download(asyncio.create_task(download_it()))
        download.num_waiting += 1
        try:
            return cast(Fetched[D], await asyncio.shield(download.task))
        except RequestError as error:
            raise RequestError(error.info.message, field=field, status=error.info.status) from None
        finally:
            download.num_waiting -= 1
            if download.task.done() or not download.num_waiting:
                download.task.cancel()
                if self._downloads.get(key) is download:  # nobody may join what is over
                    del self._downloads[key]

    async def _download(self, url: URL, field: str, validators: Validators | None, make_body: Callable[[], Any]) -> Fetched[Any]:
        async with self._slots:
            body = make_body()
            try:
                async with asyncio.timeout(self._config.media_timeout_s):
                    asked = url
                    for _ in range(MAX_REDIRECTS + 1):
                        self._check_host(url, field)
                        result = await self._get(url, field, validators, body)
                        if isinstance(result, Fetched):
                            return result if url == asked else result._replace(validators=None)  # a redirect may lead elsewhere next time
                        url, validators = result, None
            except TimeoutError:
                raise RequestError(f"the media did not come within {self._config.media_timeout_s:.0f} s", field=field) from None
            except (aiohttp.ClientError, OSError, ValueError):
                raise RequestError("the media's host cannot be reached", field=field) from None
            finally:
                body.close()
        raise RequestError(f"the media URL redirects more than {MAX_REDIRECTS} times", field=field)

    async def _get(self, url: URL, field: str, validators: Validators | None, body: Any) -> Fetched[Any] | URL:
        """The body, or where a redirect leads."""
        async with self._client().get(url, allow_redirects=False, headers=validators.headers if validators else None) as response:
            if response.status == 304 and validators is not None:
                return Fetched(None, validators)
            if response.status in (301, 302, 303, 307, 308):
                target = url.join(URL(response.headers.get("Location", "")))
                if target.scheme not in ("http", "https"):
                    raise RequestError("the media URL redirects to something that is neither http nor https", field=field)
                return target
            if response.status != 200:
                raise RequestError(f"the media's host answered with status {response.status}", field=field)
            if (response.content_length or 0) > body.max_bytes:
                raise too_large(body.max_bytes, field)
            num_bytes = 0
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > body.max_bytes:
                    raise too_large(body.max_bytes, field)
                await body.write(chunk)
            found = Validators(response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))
            return Fetched(await body.end(), found if any(found) else None)

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

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def check_form(url: str, field: str) -> None:
    """Before anything is parsed: a client's mistake may be as large as a picture."""
    start = url[:8].lower()
    # A JPEG in base64 begins like a path.
    is_path = start.startswith("/") and not start.startswith("/9j/")
    if not is_path and not start.startswith(("http:", "https:", "file:")):
        raise RequestError(NO_URL, field=field)
    if len(url) > MAX_URL:
        raise RequestError(f"a media URL has at most {MAX_URL} characters, this has {len(url)}", field=field)


def _read_all(fd: int, max_bytes: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read(max_bytes)


def _as_video_file(fd: int, max_bytes: int) -> VideoFile:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return VideoFile(os.dup(fd), file.tell(), digest)


def too_large(max_bytes: int, field: str) -> RequestError:
    return RequestError(f"the media is larger than {max_bytes // MIB} MiB", field=field, status=413)


def decode_base64(data: bytes | memoryview, max_bytes: int, field: str) -> bytes:
    """Base64 as browsers take it. Raises RequestError when it is broken, or larger than `max_bytes`."""
    try:
        decoded = forgiving_base64(bytes(data))
    except ValueError:
        raise RequestError("the base64 data of the media is broken", field=field) from None
    if len(decoded) > max_bytes:
        raise too_large(max_bytes, field)
    return decoded
