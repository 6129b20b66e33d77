"""Pictures and videos as items of a prompt, and their chunks, which are encoded one by one.

A picture is one chunk, since all its patches attend to each other. Frames of a video do not, so a video is
several chunks: on several ViTs, and the first are encoded while later ones are still being decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from pipeline.families import ImageSize, MediaInfo, ModelInfo, SampledFrames, Segment
from pipeline.wire.base import GridTHW
from workers.preprocess.readers import MediaReaders
from workers.preprocess.videos import VideoFile

Pixels = npt.NDArray[Any]
Data = bytes | memoryview
FRAMES_AT_ONCE = 8  # frames of a video given as pictures that wait for a process


class Source(Protocol):
    """Gives the pixels of an item."""

    async def load(self, frames: Sequence[int]) -> None:
        """Fetches the data that `decode` of these frames reads. Raises RequestError where that fails."""

    async def decode(self, frames: Sequence[int], out: Pixels, offset: int) -> None:
        """Fills out [frames, height, width, 3], at `offset` bytes in the pixel pool. Raises RequestError for
        broken media.

        Must be awaited to its end: processes write to the pool until then.
        """


@dataclass(slots=True)
class MediaChunk:
    """A part of an item that a ViT encodes in one piece."""

    source: Source
    frames: tuple[int, ...]
    size: ImageSize
    grid_thw: GridTHW
    mm_hash: bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.frames), *self.size, 3)

    @property
    def pixel_bytes(self) -> int:
        return len(self.frames) * self.size.height * self.size.width * 3


@dataclass(slots=True)
class Item:
    """A picture or video of a prompt."""

    media: MediaInfo
    segments: tuple[Segment, ...]  # its text and placeholders in the prompt
    mm_hash: bytes  # of the pixels
    kv_hash: bytes  # its key in the prefix cache
    chunks: list[MediaChunk]


class PictureSource:
    """`load` fetches the bytes; it is not called for a picture that a ViT has cached."""

    def __init__(self, load: Callable[[], Awaitable[Data]], field: str, readers: MediaReaders) -> None:
        self._load, self._field, self._readers = load, field, readers

    async def load(self, frames: Sequence[int]) -> None:
        await self._load()

    async def decode(self, frames: Sequence[int], out: Pixels, offset: int) -> None:
        await self._readers.read_picture(await self._load(), ImageSize(*out.shape[1:3]), offset, self._field)


class FramesSource:
    """A video given as a list of pictures."""

    def __init__(self, pictures: Sequence[Source]) -> None:
        self._pictures = pictures

    async def load(self, frames: Sequence[int]) -> None:
        await gather(self._pictures[frame].load((0,)) for frame in frames)

    async def decode(self, frames: Sequence[int], out: Pixels, offset: int) -> None:
        """After the first broken frame no other is begun."""
        gate, errors = asyncio.Semaphore(FRAMES_AT_ONCE), list[Exception]()

        async def decode(index: int, frame: int) -> None:
            place = out[index : index + 1]
            async with gate:
                if not errors:
                    try:
                        await self._pictures[frame].decode((0,), place, offset + index * place.nbytes)
                    except Exception as error:  # noqa: BLE001  raised when all frames have ended
                        errors.append(error)

        await asyncio.gather(*(decode(index, frame) for index, frame in enumerate(frames)))
        if errors:
            raise errors[0]


class VideoSource:
    def __init__(self, load: Callable[[], Awaitable[VideoFile]], readers: MediaReaders, field: str) -> None:
        self._load, self._readers, self._field = load, readers, field

    async def load(self, frames: Sequence[int]) -> None:
        await self._load()

    async def decode(self, frames: Sequence[int], out: Pixels, offset: int) -> None:
        await self._readers.read(await self._load(), frames, ImageSize(*out.shape[1:3]), offset, self._field)


def picture_item(source: Source, size: ImageSize, mm_hash: bytes, info: ModelInfo) -> Item:
    media = MediaInfo(info.vision.grid_of(size))
    return _item(media, mm_hash, [MediaChunk(source, (0,), size, media.grid_thw, mm_hash)], info)


def video_item(
    source: Source, frames: SampledFrames, size: ImageSize, content: bytes, info: ModelInfo, num_vits: int
) -> Item:  # fmt: skip
    """`content` is the hash of the whole video and of its settings.

    The last frame stands for those that a temporal patch lacks.
    """
    vision = info.vision
    media = MediaInfo(vision.grid_of(size, len(frames.numbers)), frames)
    step = info.family.chunk_length(media.grid_thw, num_vits, info) * vision.temporal_patch_size
    chunks: list[MediaChunk] = []
    digest = hashlib.sha256(content)
    for first in range(0, len(frames.numbers), step):
        part = frames.numbers[first : first + step]
        mm_hash = hashlib.sha256(content + repr((part, tuple(size))).encode()).digest()
        digest.update(mm_hash)
        chunks.append(MediaChunk(source, part, size, vision.grid_of(size, len(part)), mm_hash))
    return _item(media, digest.digest(), chunks, info)


def _item(media: MediaInfo, mm_hash: bytes, chunks: list[MediaChunk], info: ModelInfo) -> Item:
    family = info.family
    return Item(media, family.segments(media, info), mm_hash, family.kv_hash(mm_hash, media, info), chunks)


async def gather(coroutines: Any) -> list[Any]:
    """All results; the first error cancels the other coroutines."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
