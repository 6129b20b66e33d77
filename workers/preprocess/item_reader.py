"""From the parts of a message to items: brings media in, and learns their content's hash and their size before anything is decoded.

What was learnt is remembered by a part's `uuid`, or by its URL as long as its host says that nothing changed: then nothing is brought in at
all, until a ViT turns out not to have it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.config import MIB, PreprocessConfig
from pipeline.errors import RequestError
from pipeline.families import ModelInfo
from pipeline.messages import ImagePart, VideoPart
from workers.preprocess.fetch import Fetched, Fetcher, Validators, decode_base64, too_large
from workers.preprocess.images import ImageSize, check_aspect, smart_resize
from workers.preprocess.media import FramesSource, Item, PictureSource, VideoSource, picture_item, video_item
from workers.preprocess.readers import MediaReaders
from workers.preprocess.video_reader import VideoMetadata
from workers.preprocess.videos import VideoFile, frame_size, sample_frames

MAX_REMEMBERED = 100_000
MAX_FPS = 240.0
MAX_UUID = 256
D = TypeVar("D")
Hold = Callable[[int], None]  # counts bytes that a request keeps
Data = bytes | memoryview


class _Known(NamedTuple):
    content: bytes  # a hash of it, or of the name that a client gave it
    size: Any  # ImageSize or VideoMetadata
    validators: Validators | None = None


class _Resolved(NamedTuple, Generic[D]):
    known: _Known
    load: Callable[[], Awaitable[D]]


class ItemReader:
    def __init__(
        self, config: PreprocessConfig, info: ModelInfo, num_vits: int, fetcher: Fetcher, threads: Executor, readers: MediaReaders
    ) -> None:  # fmt: skip
        self._config, self._info, self._num_vits = config, info, num_vits
        self._fetcher, self._threads, self._readers = fetcher, threads, readers
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # by a hash: what clients send has any length
        self._max_frames = info.video.max_frames if config.max_video_frames is None else config.max_video_frames
        self._settings = f"{info.folder}|".encode()

    async def read(self, part: ImagePart | VideoPart, field: str, frames: Sequence[Data], salt: bytes, hold: Hold) -> Item:
        """Tenants with different salts share nothing. Raises RequestError for what cannot be had, or be an item."""
        if isinstance(part, ImagePart):
            return await self._picture(part, field, frames, salt, hold)
        if part.frames:
            return await self._frames(part, field, frames, salt, hold)
        return await self._video(part, field, frames, salt, hold)

    async def _picture(self, part: ImagePart, field: str, frames: Sequence[Data], salt: bytes, hold: Hold) -> Item:
        vision = self._info.vision
        low, high = self._limits(part, field, vision.min_pixels, vision.max_pixels)
        known, load = await self._resolve_picture(part, field, frames, salt, hold)
        size = smart_resize(known.size, vision.factor, low, high)
        mm_hash = self._hash(salt, "picture", known.content, size)
        return picture_item(PictureSource(load, field, self._readers), size, mm_hash, vision)

    async def _frames(self, part: VideoPart, field: str, frames: Sequence[Data], salt: bytes, hold: Hold) -> Item:
        if part.fps is not None:
            raise RequestError("fps does not apply to a list of frames: all of them are seen", field=field)
        if part.uuid or any(frame.min_pixels or frame.max_pixels for frame in part.frames):
            raise RequestError("a list of frames has no uuid, and its limits of size are those of the video", field=field)
        most = self._most_frames(part, field)
        if len(part.frames) > most:
            raise RequestError(f"the video has {len(part.frames)} frames, the limit is {most}", field=field)
        pictures = await gather(self._resolve_picture(frame, f"{field}.url[{index}]", frames, salt, hold) for index, frame in enumerate(part.frames))
        size = self._frame_size(part, field, pictures[0].known.size, len(pictures))
        content = hashlib.sha256(b"".join(picture.known.content for picture in pictures)).digest()
        source = FramesSource([PictureSource(load, field, self._readers) for _, load in pictures])
        return video_item(source, range(len(pictures)), size, self._hash(salt, "frames", content, size), self._info, self._num_vits)

    async def _video(self, part: VideoPart, field: str, frames: Sequence[Data], salt: bytes, hold: Hold) -> Item:
        most = self._most_frames(part, field)
        if part.fps is not None and not 0 < part.fps <= MAX_FPS:
            raise RequestError(f"fps must be above 0 and at most {MAX_FPS:.0f}, got {part.fps}", field=f"{field}.fps")
        known, load = await self._resolve_video(part, field, frames, salt, hold)
        metadata, video, vision = known.size, self._info.video, self._info.vision
        source_size = ImageSize(metadata.height, metadata.width)
        check_aspect(source_size, field)
        sampled = sample_frames(metadata, part.fps or video.fps, video.min_frames, most, vision.temporal_patch_size)
        size = self._frame_size(part, field, source_size, len(sampled))
        content = self._hash(salt, "video", known.content, size)
        return video_item(VideoSource(load, self._readers, field), sampled, size, content, self._info, self._num_vits)

    def _hash(self, salt: bytes, kind: str, content: bytes, size: ImageSize) -> bytes:
        """Key of media as the model sees them: sha256 of their content, and of all that says what is made of it."""
        return hashlib.sha256(repr((self._settings, salt, kind, content, tuple(size))).encode()).digest()

    def _limits(self, part: ImagePart | VideoPart, field: str, low: int, high: int) -> tuple[int, int]:
        for name, value in (("min_pixels", part.min_pixels), ("max_pixels", part.max_pixels)):
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} must be between the server's {low} and {high}, got {value}", field=f"{field}.{name}")
        low, high = part.min_pixels or low, part.max_pixels or high
        if low > high:
            raise RequestError(f"min_pixels must be at most max_pixels, got {low} and {high}", field=f"{field}.min_pixels")
        return low, high

    def _most_frames(self, part: VideoPart, field: str) -> int:
        least, most = self._info.vision.temporal_patch_size, self._max_frames
        if part.max_frames is not None and not least <= part.max_frames <= most:
            limits = f"{least} and the server's {most}"
            raise RequestError(f"max_frames must be between {limits}, got {part.max_frames}", field=f"{field}.max_frames")
        return part.max_frames or most

    def _frame_size(self, part: VideoPart, field: str, size: ImageSize, num_frames: int) -> ImageSize:
        video = self._info.video
        low, high = self._limits(part, field, video.min_pixels, video.max_pixels)
        return frame_size(size, num_frames, low, high, video.max_total_pixels, self._info.vision.factor)

    # What is known of media, and how to get them.

    async def _resolve_picture(self, part: ImagePart, field: str, frames: Sequence[Data], salt: bytes, hold: Hold) -> _Resolved[Data]:
        max_bytes = self._config.max_media_mib * MIB

        async def load(validators: Validators | None) -> Fetched[Data]:
            if part.url:
                fetched = await self._fetcher.fetch(part.url, field, validators)
                hold(len(fetched.data or b""))
                return Fetched(fetched.data, fetched.validators)
            return Fetched(await self._in_thread(inline_data, part, field, frames, max_bytes), None)

        async def inspect(data: Data) -> _Known:
            size = await self._readers.inspect_picture(data, field)
            return _Known(await self._in_thread(_sha256, data), size)

        return await self._resolve(part, "picture", field, salt, load, inspect)

    async def _resolve_video(self, part: VideoPart, field: str, frames: Sequence[Data], salt: bytes, hold: Hold) -> _Resolved[VideoFile]:
        max_bytes = self._config.max_video_mib * MIB

        def spool() -> VideoFile:
            data = inline_data(part, field, frames, max_bytes)
            with tempfile.TemporaryFile() as file:
                file.write(data)
                file.flush()
                return VideoFile(os.dup(file.fileno()), len(data), hashlib.sha256(data).digest())

        async def load(validators: Validators | None) -> Fetched[VideoFile]:
            if part.url:
                fetched = await self._fetcher.fetch_file(part.url, field, validators)
                hold(fetched.data.nbytes if fetched.data is not None else 0)
                return fetched
            return Fetched(await self._in_thread(spool), None)

        async def inspect(file: VideoFile) -> _Known:
            metadata: VideoMetadata = await self._readers.inspect(file, field)
            return _Known(file.digest, metadata)

        return await self._resolve(part, "video", field, salt, load, inspect)

    async def _resolve(
        self, part: ImagePart | VideoPart, kind: str, field: str, salt: bytes,
        load: Callable[[Validators | None], Awaitable[Fetched[D]]], inspect: Callable[[D], Awaitable[_Known]],
    ) -> _Resolved[D]:  # fmt: skip
        if len(part.uuid) > MAX_UUID:
            raise RequestError(f"a uuid has at most {MAX_UUID} characters, this has {len(part.uuid)}", field=f"{field}.uuid")
        key = hashlib.sha256(repr((salt, kind, part.uuid, "" if part.uuid else part.url)).encode()).digest() if part.uuid or part.url else None
        known = self._known.get(key) if key is not None else None
        if known is None or not part.uuid:
            fetched = await load(known.validators if known is not None else None)
            if fetched.data is not None:
                data = fetched.data
                known = (await inspect(data))._replace(validators=fetched.validators)
                if part.uuid:
                    known = known._replace(content=hashlib.sha256(part.uuid.encode()).digest())
                if key is not None and (part.uuid or fetched.validators is not None):
                    self._remember(key, known)
                return _Resolved(known, lambda: _ready(data))
        assert known is not None
        self._remember(key, known)
        seen = known

        async def load_now() -> D:
            fetched = await load(None)
            assert fetched.data is not None
            if not part.uuid and (await inspect(fetched.data)).content != seen.content:
                raise RequestError("the content of the URL changed while the request was under way", field=field)
            return fetched.data

        return _Resolved(known, _once(load_now))

    def _remember(self, key: bytes | None, known: _Known) -> None:
        assert key is not None
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    async def _in_thread(self, function: Callable[..., D], *args: object) -> D:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def inline_data(part: ImagePart | VideoPart, field: str, frames: Sequence[Data], max_bytes: int) -> Data:
    """The bytes of a part that came with its message."""
    if not 0 <= part.frame < len(frames):
        if part.uuid:
            raise RequestError("nothing is known (any more) under this uuid: send the content with it", field=f"{field}.uuid", status=404)
        raise RequestError("the part has neither a URL nor data", field=field)
    data = frames[part.frame]
    if part.is_base64:
        data = decode_base64(data, max_bytes, field)
    if len(data) > max_bytes:
        raise too_large(max_bytes, field)
    return data


def _sha256(data: Data) -> bytes:
    return hashlib.sha256(data).digest()


async def _ready(data: D) -> D:
    return data


def _once(load: Callable[[], Coroutine[Any, Any, D]]) -> Callable[[], Awaitable[D]]:
    """The chunks of a video share what one of them brought in."""
    task: asyncio.Task[D] | None = None

    async def shared() -> D:
        nonlocal task
        if task is None:
            task = asyncio.create_task(load())
        return await asyncio.shield(task)

    return shared


async def gather(coroutines: Any) -> list[Any]:
    """All results; the first error ends the others, for whom nobody waits any more."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
