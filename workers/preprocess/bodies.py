"""Bodies take a download's bytes: in memory, or in an unnamed file."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from typing import IO, ClassVar, Generic, Protocol, TypeVar

from pipeline.config import MIB
from pipeline.wire.errors import RequestError
from workers.preprocess.picture_files import KINDS
from workers.preprocess.shortages import own_file
from workers.preprocess.videos import VideoFile

D_co = TypeVar("D_co", covariant=True)
MEDIA_TYPES = [f"image/{name.lower()}" for name in KINDS]
WRITE_BYTES = 1 << 20  # to a file in one call, in a thread


class Body(Protocol, Generic[D_co]):
    """Takes chunks, returns the whole at the end, and is always closed."""

    accept: ClassVar[str]  # the Accept header
    max_bytes: int

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> D_co: ...

    def close(self) -> None: ...


class MemoryBody:
    """A picture. Hosts choose a format by `accept`: readable ones come first."""

    accept: ClassVar[str] = ",".join([*MEDIA_TYPES, "image/*;q=0.8", "*/*;q=0.5"])

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._data = bytearray()

    async def write(self, data: bytes) -> None:
        self._data += data

    async def end(self) -> bytes:
        return bytes(self._data)

    def close(self) -> None:
        pass


class FileBody:
    """A video in an unnamed file, which is gone however this process ends.

    Raises RequestError without a field where the disk is full or no descriptor is free.
    """

    accept: ClassVar[str] = "video/*,*/*;q=0.5"

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        with own_file():
            self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  `close` does
        self._digest = hashlib.sha256()
        self._pending = bytearray()

    async def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self._flush()

    async def end(self) -> VideoFile:
        await self._flush()
        with own_file(), self._file:
            self._file.flush()
            return VideoFile(os.dup(self._file.fileno()), self._file.tell(), self._digest.digest())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # from unwritten data, which is not needed any more
            self._file.close()

    async def _flush(self) -> None:
        data, self._pending = self._pending, bytearray()
        with own_file():
            await asyncio.to_thread(self._file.write, data)
        await asyncio.to_thread(self._digest.update, data)


def too_large(max_bytes: int, field: str) -> RequestError:
    return RequestError(f"the media is larger than {max_bytes // MIB} MiB", field=field, status=413)
