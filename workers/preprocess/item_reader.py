"""From the parts of a message to items: fetches media, and finds their hash and size before any decoding.

Hash and size are cached: by a part's `uuid`, for later parts with only that; and by its URL, as long as the
host says that the content is unchanged. Media with a cached hash are fetched only if a ViT lacks the chunk.
Content in the message always wins over cached content of the same name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.config import MIB, PreprocessConfig
from pipeline.families import ImageSize, ModelInfo, SampledFrames
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ImagePart, VideoPart
from workers.preprocess.fetch import Fetched, Fetcher, Validators, check_form, decode_base64, too_large
from workers.preprocess.geometry import check_settings, chosen_frames, picture_size, video_frame_size
from workers.preprocess.images import check_aspect
from workers.preprocess.media import (
    FramesSource,
    Item,
    PictureSource,
    VideoSource,
    gather,
    picture_item,
    video_item,
)
from workers.preprocess.names import TenantCache
from workers.preprocess.readers import MediaReaders
from workers.preprocess.shortages import own_file
from workers.preprocess.threads import FairThreads, on_behalf_of
from workers.preprocess.video import VideoMetadata
from workers.preprocess.videos import VideoFile

MAX_UUID = 256
D = TypeVar("D")
Hold = Callable[[int], None]  # counts bytes that a request keeps
Data = bytes | memoryview


class Scope(NamedTuple):
    """The owner of media. Names belong to a tenant and a salt; entries cached by content, to a salt.

    `encoder`: what of the request's adapter their embeddings depend on.
    """

    tenant: str
    salt: bytes
    encoder: bytes = b""


class _Known(NamedTuple):
    content: bytes  # its hash
    size: Any  # ImageSize or VideoMetadata
    validators: Validators | None = None


class _Resolved(NamedTuple, Generic[D]):
    known: _Known
    load: Callable[[], Awaitable[D]]


class ItemReader:
    def __init__(
        self, config: PreprocessConfig, info: ModelInfo, num_vits: int, fetcher: Fetcher,
        threads: FairThreads, readers: MediaReaders
    ) -> None:  # fmt: skip
        self._config, self._info, self._num_vits = config, info, num_vits
        self._fetcher, self._threads, self._readers = fetcher, threads, readers
        self._known: TenantCache[_Known] = TenantCache()
        self._max_frames = (
            info.video.max_frames if config.max_video_frames is None else config.max_video_frames
        )
        self._settings = f"{info.folder}|".encode()

    async def read(
        self, part: ImagePart | VideoPart, field: str, frames: Sequence[Data], scope: Scope, hold: Hold
    ) -> Item:
        """Raises RequestError for media that cannot be fetched, or cannot be an item."""
        check_settings(part, self._info, self._max_frames, field)
        if isinstance(part, ImagePart):
            return await self._picture(part, field, frames, scope, hold)
        if part.frames:
            return await self._frames(part, field, frames, scope, hold)
        return await self._video(part, field, frames, scope, hold)

    async def _picture(
        self, part: ImagePart, field: str, frames: Sequence[Data], scope: Scope, hold: Hold
    ) -> Item:
        known, load = await self._resolve_picture(part, field, frames, scope, hold)
        size = picture_size(part, known.size, self._info, field)
        mm_hash = self._hash(scope, "picture", known.content, size)
        return picture_item(PictureSource(load, field, self._readers), size, mm_hash, self._info)

    async def _frames(
        self, part: VideoPart, field: str, frames: Sequence[Data], scope: Scope, hold: Hold
    ) -> Item:
        pictures = await gather(
            self._resolve_picture(frame, f"{field}.url[{index}]", frames, scope, hold)
            for index, frame in enumerate(part.frames)
        )
        size = video_frame_size(part, pictures[0].known.size, len(pictures), self._info, field)
        content = hashlib.sha256(b"".join(picture.known.content for picture in pictures)).digest()
        source = FramesSource([PictureSource(load, field, self._readers) for _, load in pictures])
        seen = SampledFrames(tuple(range(len(pictures))), len(pictures), part.fps, part.timestamps)
        mm_hash = self._hash(scope, "frames", content, size)
        return video_item(source, seen, size, mm_hash, self._info, self._num_vits)

    async def _video(
        self, part: VideoPart, field: str, frames: Sequence[Data], scope: Scope, hold: Hold
    ) -> Item:
        known, load = await self._resolve_video(part, field, frames, scope, hold)
        metadata: VideoMetadata = known.size
        source_size = ImageSize(metadata.height, metadata.width)
        check_aspect(source_size, field)
        seen = chosen_frames(part, metadata, self._info, self._max_frames, field)
        size = video_frame_size(part, source_size, len(seen.numbers), self._info, field)
        content = self._hash(scope, "video", known.content, size)
        source = VideoSource(load, self._readers, field)
        return video_item(source, seen, size, content, self._info, self._num_vits)

    def _hash(self, scope: Scope, kind: str, content: bytes, size: ImageSize) -> bytes:
        """The `mm_hash`: sha256 of the content and of all settings that affect the embeddings."""
        owner = self._settings, scope.salt, scope.encoder
        return hashlib.sha256(repr((*owner, kind, content, tuple(size))).encode()).digest()

    # Cached hashes and sizes, and how to fetch the media.

    async def _resolve_picture(
        self, part: ImagePart, field: str, frames: Sequence[Data], scope: Scope, hold: Hold
    ) -> _Resolved[Data]:
        max_bytes, asker = self._config.max_media_mib * MIB, on_behalf_of.get().asker

        async def load(validators: Validators | None) -> Fetched[Data]:
            if part.url:
                fetched = await self._fetcher.fetch(part.url, field, validators, asker)
                hold(len(fetched.data or b""))
                return Fetched(fetched.data, fetched.validators)
            return Fetched(await self._threads.run(inline_data, part, field, frames, max_bytes), None)

        async def inspect(data: Data) -> _Known:
            size = await self._readers.inspect_picture(data, field)
            return _Known(await self._threads.run(_sha256, data), size)

        return await self._resolve(part, "picture", field, scope, load, inspect)

    async def _resolve_video(
        self, part: VideoPart, field: str, frames: Sequence[Data], scope: Scope, hold: Hold
    ) -> _Resolved[VideoFile]:
        max_bytes, asker = self._config.max_video_mib * MIB, on_behalf_of.get().asker

        def spool() -> VideoFile:
            data = inline_data(part, field, frames, max_bytes)
            with own_file(field), tempfile.TemporaryFile() as file:
                file.write(data)
                file.flush()
                return VideoFile(os.dup(file.fileno()), len(data), hashlib.sha256(data).digest())

        async def load(validators: Validators | None) -> Fetched[VideoFile]:
            if part.url:
                fetched = await self._fetcher.fetch_file(part.url, field, validators, asker)
                hold(fetched.data.nbytes if fetched.data is not None else 0)
                return fetched
            return Fetched(await self._threads.run(spool), None)

        async def inspect(file: VideoFile) -> _Known:
            metadata: VideoMetadata = await self._readers.inspect(file, field)
            return _Known(file.digest, metadata)

        return await self._resolve(part, "video", field, scope, load, inspect)

    async def _resolve(
        self, part: ImagePart | VideoPart, kind: str, field: str, scope: Scope,
        load: Callable[[Validators | None], Awaitable[Fetched[D]]], inspect: Callable[[D], Awaitable[_Known]],
    ) -> _Resolved[D]:  # fmt: skip
        if len(part.uuid) > MAX_UUID:
            what = f"a uuid has at most {MAX_UUID} characters, this has {len(part.uuid)}"
            raise RequestError(what, field=f"{field}.uuid")
        if part.url:
            check_form(part.url, field)  # limits the length before the URL is hashed
        tenant = scope.tenant
        name, url = _key(scope, kind, "uuid", part.uuid), _key(scope, kind, "url", part.url)
        if part.uuid and not part.url and part.frame < 0:
            known = self._known.get(tenant, name)
            if known is None:
                raise unknown_uuid(field)
            return _Resolved(known, _once(partial(_load_same, load, inspect, known, field)))
        # The content wins. Its name is stored for later parts that have only the name.
        known = self._known.get(tenant, url) if part.url else None
        fetched = await load(known.validators if known is not None else None)
        if (data := fetched.data) is not None:
            known = (await inspect(data))._replace(validators=fetched.validators)
            resolved = _Resolved(known, partial(_ready, data))
        else:
            assert known is not None
            resolved = _Resolved(known, _once(partial(_load_same, load, inspect, known, field)))
        if known.validators is not None:
            self._known.put(tenant, url, known)
        if part.uuid:
            self._known.put(tenant, name, known._replace(validators=None))
        return resolved


def _key(scope: Scope, kind: str, what: str, name: str) -> bytes:
    """A hash, since names of clients have any length."""
    return hashlib.sha256(repr((scope.salt, kind, what, name)).encode()).digest()


async def _load_same(
    load: Callable[[Validators | None], Awaitable[Fetched[D]]], inspect: Callable[[D], Awaitable[_Known]],
    seen: _Known, field: str
) -> D:  # fmt: skip
    """Fetches media with a cached hash, which a ViT needs now."""
    fetched = await load(None)
    assert fetched.data is not None
    if (await inspect(fetched.data)).content != seen.content:
        raise RequestError("the content of the URL changed while the request was under way", field=field)
    return fetched.data


def unknown_uuid(field: str) -> RequestError:
    what = "nothing is known (any more) under this uuid: send the content with it"
    return RequestError(what, field=f"{field}.uuid", status=404)


def inline_data(part: ImagePart | VideoPart, field: str, frames: Sequence[Data], max_bytes: int) -> Data:
    """The bytes of a part that came with its message."""
    if not 0 <= part.frame < len(frames):
        if part.uuid:
            raise unknown_uuid(field)
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
    """The chunks of a video share one fetch. It is cancelled once no chunk waits for it: otherwise a client
    that cancels its requests could have any number of downloads in flight.
    """
    task: asyncio.Task[D] | None = None
    num_waiting = 0

    async def shared() -> D:
        nonlocal task, num_waiting
        if task is None:
            task = asyncio.create_task(load())
        mine = task
        num_waiting += 1
        try:
            return await asyncio.shield(mine)
        finally:
            num_waiting -= 1
            if not num_waiting and not mine.done():
                mine.cancel()
                task = None

    return shared
