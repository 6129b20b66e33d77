"""The processes that read pictures and videos: bounded in number, started when needed, requests in turn.

A job is whole: any process can do it. A job that takes too much processor time or memory, hangs, or
kills its process ends in a RequestError for its request, and the next job gets a fresh process. Whose process
the kernel kills for lack of memory, readers first, is told that there is no room now.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pipeline.families import ImageSize
from pipeline.wire.errors import RequestError
from workers.preprocess.places import Places
from workers.preprocess.reader_child import NO_VIDEO, ReaderChild
from workers.preprocess.reader_process import Answer, Failed, Job, PictureJob, PictureSize, VideoJob
from workers.preprocess.shortages import is_shortage, no_room
from workers.preprocess.threads import on_behalf_of
from workers.preprocess.video import VideoMetadata
from workers.preprocess.videos import VideoFile

logger = logging.getLogger(__name__)
KEPT_INBOX_BYTES = 4 << 20


Data = bytes | memoryview
Source = Data | VideoFile


class ReadLimits(NamedTuple):
    """Of one job."""

    picture_cpu_s: float
    video_cpu_s: float
    max_pixels: int  # of a picture or frame in its file
    memory_mib: int
    stall_s: float = 30.0  # without processor time, after which the decoder counts as hung


class _Died(Exception):
    """The process has ended by itself, or by a signal from outside, and is reaped. Its own limits and faults
    never are SIGKILL."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.status = status


class MediaReaders:
    """At most `count` reading processes."""

    def __init__(self, pool_fd: int, count: int, limits: ReadLimits, video_reader: str) -> None:
        self._pool_fd, self.limits, self._video_reader = pool_fd, limits, video_reader
        self._places = Places(count)
        self._idle: list[ReaderChild] = []
        self._all: set[ReaderChild] = set()
        self._under_way: set[asyncio.Task[Answer]] = set()
        self._cheap: set[asyncio.Task[Answer]] = set()  # not cancelled: a kill would cost a process start

    async def inspect_picture(self, data: Data, field: str) -> ImageSize:
        """The size as shown. Raises RequestError for no picture, or too large a one."""
        answer = await self._run(self._picture_job(data), field, data)
        assert isinstance(answer, PictureSize)
        return ImageSize(answer.height, answer.width)

    async def read_picture(self, data: Data, size: ImageSize, offset: int, field: str) -> None:
        """Writes resized pixels at `offset` in the pixel pool. Raises RequestError where that fails.

        Must be awaited to its end, as must `read`: a process writes to the pool until then.
        """
        place = {"height": size.height, "width": size.width, "offset": offset}
        await self._run(msgspec.structs.replace(self._picture_job(data), **place), field, data)

    def _picture_job(self, data: Data) -> PictureJob:
        return PictureJob(len(data), self.limits.picture_cpu_s, self.limits.max_pixels)

    async def inspect(self, file: VideoFile, field: str) -> VideoMetadata:
        """Raises RequestError for no video, or too large frames."""
        answer = await self._run(self._video_job(file), field, file)
        assert isinstance(answer, VideoMetadata)
        return answer

    async def read(
        self,
        file: VideoFile,
        frames: Sequence[int],
        size: ImageSize,
        offset: int,
        field: str,
    ) -> None:
        """Writes resized frames at `offset` in the pixel pool. Raises RequestError where that fails."""
        place = {"height": size.height, "width": size.width, "offset": offset}
        job = msgspec.structs.replace(self._video_job(file), frames=tuple(frames), **place)
        await self._run(job, field, file)

    def _video_job(self, file: VideoFile) -> VideoJob:
        return VideoJob(file.path, True, self.limits.video_cpu_s, self.limits.max_pixels)

    async def _run(self, job: Job, field: str, source: Source) -> Answer:
        """In a task: if the caller is cancelled, the process is reaped before its place is free."""
        task = asyncio.create_task(self._do(job, field, source))
        self._under_way.add(task)
        task.add_done_callback(self._end)
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task not in self._cheap:
                task.cancel()
            raise
        if isinstance(answer, Failed):
            raise RequestError(answer.reason or _broken(job), field=field, status=answer.status)
        return answer

    def _end(self, task: asyncio.Task[Answer]) -> None:
        self._under_way.discard(task)
        self._cheap.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, since the caller may be cancelled: asyncio would warn

    async def _do(self, job: Job, field: str, source: Source) -> Answer:
        async with self._places.take(on_behalf_of.get().asker):
            return await self._do_now(job, field, source)

    async def _do_now(self, job: Job, field: str, source: Source) -> Answer:
        if isinstance(job, PictureJob) and not job.height and (task := asyncio.current_task()) is not None:
            self._cheap.add(task)
        try:
            number = source.number if isinstance(source, VideoFile) else NO_VIDEO
            idle = self._take(number)
            try:
                return await self._try(idle or await self._start(), job, number, source)
            except _Died as death:
                if idle is None or death.status == -signal.SIGPROF:
                    raise
            # The process may have died because of an earlier job.
            return await self._try(await self._start(), job, number, source)
        except _Died as death:
            if death.status == -signal.SIGPROF:
                limit = f"more than {job.cpu_s:g} s of processor time"
                raise RequestError(f"the {_kind(job)} takes {limit} to read", field=field) from None
            if death.status == -signal.SIGKILL:  # of the kernel, for lack of memory, or of an operator
                raise no_room(death, field) from None
            raise RequestError(_broken(job), field=field) from None
        except TimeoutError:
            stalled = f"could not be read: its decoder stood still for {self.limits.stall_s:g} s"
            raise RequestError(f"the {_kind(job)} {stalled}", field=field) from None
        except OSError as error:  # no process could be started, or its inbox could not be filled
            raise no_room(error, field) from None

    async def _try(self, child: ReaderChild, job: Job, number: int, source: Source) -> Answer:
        """Raises _Died, TimeoutError for a hung child, and OSError where its inbox gets no room.
        The child is reaped first."""
        if isinstance(job, VideoJob):
            job = msgspec.structs.replace(job, is_new=child.video != number)
        child.video = number
        try:
            if not isinstance(source, VideoFile):
                await child.fill(memoryview(source))
            answer = await child.ask(job, self.limits.stall_s)
        # RuntimeError: uvloop raises it for the pipe to a process that has died.
        except (asyncio.IncompleteReadError, OSError, RuntimeError) as error:
            await self._kill(child)
            if isinstance(error, TimeoutError) or is_shortage(error):  # which are OSErrors
                raise
            logger.warning("a reader of media ended with status %s", child.returncode)
            raise _Died(child.returncode) from None
        except BaseException:
            await self._kill(child)  # nobody reads the answer any more
            raise
        if isinstance(job, PictureJob) and job.nbytes > KEPT_INBOX_BYTES:
            child.empty()
        self._idle.append(child)
        return answer

    def _take(self, number: int) -> ReaderChild | None:
        """An idle child: best the one that has this file open, and for a picture one that has none open."""
        if not self._idle:
            return None
        index = next((index for index, idle in enumerate(self._idle) if idle.video == number), -1)
        return self._idle.pop(index)

    async def _start(self) -> ReaderChild:
        """Raises OSError for a shortage on this machine."""
        child = await ReaderChild.start(self._pool_fd, self.limits.memory_mib, self._video_reader)
        self._all.add(child)
        return child

    async def _kill(self, child: ReaderChild) -> None:
        await child.kill()
        self._all.discard(child)

    async def close(self) -> None:
        for task in list(self._under_way):
            task.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way)
        while self._idle:
            await self._kill(self._idle.pop())

    @property
    def is_idle(self) -> bool:
        return self._places.is_idle


def _kind(job: Job) -> str:
    return "picture" if isinstance(job, PictureJob) else "video"


def _broken(job: Job) -> str:
    if isinstance(job, PictureJob):
        return "the picture cannot be decoded"
    return "the media is not a video that can be decoded"
