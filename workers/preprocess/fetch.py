"""Fetches media: URLs, local files, base64. All input is untrusted.

One parser for URLs, and exactly the parsed URL is fetched (`media_urls.py`). Names are resolved once
(`resolver.py`); addresses that are not public are refused unless an option allows them. Each redirect is
checked like the first URL (`downloads.py`). Sizes are limited while reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.client.data_urls import forgiving_base64
from pipeline.config import MIB, PreprocessConfig
from pipeline.process.metrics import STAGE_SECONDS, Histogram
from pipeline.wire.errors import RequestError
from workers.preprocess.bodies import Body, FileBody, MemoryBody
from workers.preprocess.bodies import too_large as too_large
from workers.preprocess.download_turns import BytesInFlight, DownloadTurns
from workers.preprocess.downloads import Downloader
from workers.preprocess.downloads import Fetched as Fetched
from workers.preprocess.downloads import Validators as Validators
from workers.preprocess.media_urls import SURROUNDING, parse_media_url
from workers.preprocess.places import NOBODY, Asker
from workers.preprocess.shortages import refusal_of
from workers.preprocess.videos import VideoFile

D = TypeVar("D")
MAX_URL = 1 << 16  # characters
NO_URL = (
    "a media URL must begin with http://, https://, data: or file://; base64 alone is none: it goes behind "
    "data:image/png;base64, or the like"
)
# Times `max_open_media_mib`: a lone tenant may have half of this in flight, as much as it may keep.
IN_FLIGHT_FACTOR = 2


@dataclass
class _Download:
    task: asyncio.Task[Any]
    num_waiting: int = 0


class Fetcher:
    """Use within one event loop; `close` it at the end."""

    def __init__(self, config: PreprocessConfig, nameservers: Sequence[str] = ()) -> None:
        """`nameservers`, each `address:port`, replace the system's."""
        self._config = config
        self._turns = DownloadTurns()
        self._in_flight = BytesInFlight(IN_FLIGHT_FACTOR * config.max_open_media_mib * MIB)
        self._downloader = Downloader(config, nameservers)
        self._downloads: dict[tuple[object, ...], _Download] = {}
        self.seconds = Histogram(STAGE_SECONDS)

    async def fetch(
        self,
        url: str,
        field: str,
        validators: Validators | None = None,
        asker: Asker = NOBODY,
    ) -> Fetched[bytes]:
        """The bytes behind an http, https or file URL or a bare path, unless `validators` still hold.

        Raises RequestError, which names the field.
        """
        max_bytes = self._config.max_media_mib * MIB
        with self._timed():
            return await self._fetch(url, field, validators, asker, MemoryBody, max_bytes, _read_all)

    async def fetch_file(
        self,
        url: str,
        field: str,
        validators: Validators | None = None,
        asker: Asker = NOBODY,
    ) -> Fetched[VideoFile]:
        """`fetch` to a file on disk. A local file is not copied."""
        max_bytes = self._config.max_video_mib * MIB
        with self._timed():
            return await self._fetch(url, field, validators, asker, FileBody, max_bytes, _as_video_file)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Measures a fetch, also one that fails or waits for its turn."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds.observe(time.monotonic() - start)

    async def _fetch(
        self,
        url: str,
        field: str,
        validators: Validators | None,
        asker: Asker,
        body: Callable[[int], Body[D]],
        max_bytes: int,
        open_file: Callable[[int, int], D],
    ) -> Fetched[D]:
        def read_file(path: str) -> Fetched[D]:
            return Fetched(self._read_file(path, field, max_bytes, open_file), None)

        check_form(url, field)
        if url.startswith("/"):
            return await asyncio.to_thread(read_file, url)
        try:
            parsed = parse_media_url(url)
        except ValueError:
            raise RequestError("the URL cannot be understood", field=field) from None
        match parsed.scheme:
            case "file":
                return await asyncio.to_thread(read_file, parsed.path)
            case "http" | "https":

                async def download() -> Fetched[D]:
                    with self._in_flight.counted(asker.tenant) as count:
                        make_body = partial(body, max_bytes)
                        return await self._downloader.download(parsed, field, validators, make_body, count)

                # The turn comes first: a shared download must not wait for another request's turn.
                async with self._turns.take(asker):
                    # Only within a tenant: a download that exceeds its tenant's share fails for all who join.
                    return await self._share((asker.tenant, parsed, validators, body), download, field)
            case _:
                raise RequestError(NO_URL, field=field)

    def _read_file(self, path: str, field: str, max_bytes: int, open_file: Callable[[int, int], D]) -> D:
        """Checks the path, and again the opened file, which may have been replaced in between."""
        root = self._config.allowed_local_media_path
        if not root:
            raise RequestError(
                "local files are not allowed here (the server's option --allowed-local-media-path)",
                field=field,
            )
        forbidden = RequestError("the file cannot be read, or lies outside the allowed folder", field=field)
        allowed = Path(root).resolve()
        try:
            if not Path(path).resolve().is_relative_to(allowed):
                raise forbidden
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                info = os.fstat(fd)
                if not Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(allowed) or not stat.S_ISREG(
                    info.st_mode
                ):
                    raise forbidden
                if info.st_size > max_bytes:
                    raise too_large(max_bytes, field)
                return open_file(fd, max_bytes)
            finally:
                os.close(fd)
        except (OSError, ValueError, RuntimeError) as error:
            raise refusal_of(error, forbidden) from None

    async def _share(
        self,
        key: tuple[object, ...],
        download_it: Callable[[], Coroutine[Any, Any, Fetched[D]]],
        field: str,
    ) -> Fetched[D]:
        """One download for all simultaneous requests of a tenant with the same URL, such as the `n` choices
        of one request."""
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
                if self._downloads.get(key) is download:  # no request may join a finished download
                    del self._downloads[key]

    async def close(self) -> None:
        await self._downloader.close()


def check_form(url: str, field: str) -> None:
    """Checked before parsing: a base64 picture by mistake is as long as a picture."""
    start = url.lstrip(SURROUNDING)[:8].lower()
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


def decode_base64(data: bytes | memoryview, max_bytes: int, field: str) -> bytes:
    """Base64 as browsers accept it. Raises RequestError when it is broken, or larger than `max_bytes`."""
    try:
        decoded = forgiving_base64(bytes(data))
    except ValueError:
        raise RequestError("the base64 data of the media is broken", field=field) from None
    if len(decoded) > max_bytes:
        raise too_large(max_bytes, field)
    return decoded
