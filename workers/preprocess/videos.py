"""Videos: which frames the model sees and how large, and the processes that read them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import struct
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.errors import RequestError
from workers.preprocess.images import ImageSize, smart_resize
from workers.preprocess.video import VideoMetadata
from workers.preprocess.video_reader import Answer, Failed, ReadJob

logger = logging.getLogger(__name__)
_numbers = itertools.count()
TORCH_LANES = 8


class VideoFile:
    """A video on disk, open and mostly without a name; closed with the last who holds it. `digest` is the sha256 of its content."""

    def __init__(self, fd: int, nbytes: int, digest: bytes) -> None:
        self.nbytes, self.digest = nbytes, digest
        self.number = next(_numbers)
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        weakref.finalize(self, os.close, fd)


def sample_frames(metadata: VideoMetadata, fps: float, min_frames: int, max_frames: int, multiple: int) -> list[int]:
    """Evenly spread frame numbers, about `fps` a second, as many as a multiple of `multiple`.

    As transformers' Qwen2-VL video processor has it (`sample_frames`), rounding included; a video of fewer
    frames than `multiple` is seen whole.
    """
    total = metadata.num_frames
    if total < multiple:
        return list(range(total))
    most = min(max_frames, total) // multiple * multiple
    wanted = int(min(max(total / metadata.fps * fps, min_frames), most)) // multiple * multiple
    numbers = _arange(total, total / max(wanted, min(multiple, most))).astype(np.int64)
    return [min(int(number), total - 1) for number in numbers]


def _arange(stop: float, step: float) -> npt.NDArray[np.float32]:
    """`torch.arange(0, stop, step)` to the last bit, which decides between two frames in long videos.

    Torch (`RangeFactoriesKernel.cpp`) computes vectors, two at a time: of each the first value is rounded to
    float32, the others are this plus multiples of the step, rounded again. What is left over is computed one
    by one. A vector has eight values (AVX2, which torch also uses for this where there is AVX-512).
    """
    index = np.arange(math.ceil(stop / step))
    single = (index * step).astype(np.float32)
    lane = index % TORCH_LANES
    base = single[index - lane].astype(np.float64)
    whole = len(index) // (2 * TORCH_LANES) * (2 * TORCH_LANES)
    return np.where(index < whole, (base + lane * step).astype(np.float32), single)


def frame_size(size: ImageSize, num_frames: int, min_pixels: int, max_pixels: int, max_total_pixels: int, factor: int) -> ImageSize:
    """Of each frame as the model sees it, smaller where there are many (`cap_pixels_per_frame` of Qwen2-VL's video processor)."""
    high = min(max_pixels, max(max_total_pixels // num_frames, int(min_pixels * 1.05)))
    return smart_resize(size, factor, min(min_pixels, high), high)


@dataclass(slots=True)
class _Process:
    process: asyncio.subprocess.Process
    video: int = -1  # the number of the file that it has open


class VideoReaders:
    """At most `count` reading processes, started when they are needed. Each job is whole: any of them can do it."""

    def __init__(
        self,
        pool_fd: int,
        count: int,
        timeout_s: float,
        max_frame_pixels: int,
        reader: str = "pyav",
    ) -> None:
        self._pool_fd, self._timeout_s, self._max_frame_pixels = pool_fd, timeout_s, max_frame_pixels
        self._reader = reader
        self._places = asyncio.Semaphore(count)
        self._idle: list[_Process] = []
        self._all: set[asyncio.subprocess.Process] = set()

    async def inspect(self, file: VideoFile, field: str) -> VideoMetadata:
        """Raises RequestError for what is no video, or has too large frames."""
        answer = await self._run(file, field)
        assert isinstance(answer, VideoMetadata)
        return answer

    async def read(self, file: VideoFile, frames: Sequence[int], size: ImageSize, offset: int, field: str) -> None:
        """Writes frames, resized, to a place in the pixel pool. Raises RequestError when they cannot be decoded.

        To be awaited to its end: until then the place is written to.
        """
        await self._run(file, field, frames=tuple(frames), height=size.height, width=size.width, offset=offset)

    async def _run(self, file: VideoFile, field: str, **what: object) -> Answer:
        async with self._places:
            idle = self._take(file)
            answer = await self._try(idle or await self._start(), file, field, **what)
            if answer is None and idle is not None:  # it may have died of what it read before
                answer = await self._try(await self._start(), file, field, **what)
        if answer is None or isinstance(answer, Failed):
            raise RequestError((answer and answer.reason) or "the media is not a video that can be decoded", field=field)
        return answer

    async def _try(self, process: _Process, file: VideoFile, field: str, **what: object) -> Answer | None:
        """None when the process has died of it."""
        is_new, process.video = process.video != file.number, file.number
        job = ReadJob(path=file.path, is_new=is_new, max_pixels=self._max_frame_pixels, **what)  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._ask(process.process, job)
        except TimeoutError:
            await self._kill(process.process)
            raise RequestError(f"the video could not be read within {self._timeout_s:.0f} s", field=field) from None
        except (asyncio.IncompleteReadError, OSError):
            await self._kill(process.process)
            logger.warning("the reader of a video ended with status %s", process.process.returncode)
            return None
        except BaseException:
            await self._kill(process.process)  # what it would say now nobody hears
            raise
        self._idle.append(process)
        return answer

    def _take(self, file: VideoFile) -> _Process | None:
        """One that waits, best the one that has the file open."""
        if not self._idle:
            return None
        index = next((index for index, idle in enumerate(self._idle) if idle.video == file.number), -1)
        return self._idle.pop(index)

    async def _start(self) -> _Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "workers.preprocess.video_reader", str(self._pool_fd), self._reader,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=(self._pool_fd,),
        )  # fmt: skip
        self._all.add(process)
        return _Process(process)

    async def _ask(self, process: asyncio.subprocess.Process, job: ReadJob) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        data = msgspec.msgpack.encode(job)
        process.stdin.write(struct.pack("<I", len(data)) + data)
        (length,) = struct.unpack("<I", await process.stdout.readexactly(4))
        return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Answer)  # type: ignore[no-any-return]

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        self._all.discard(process)

    async def close(self) -> None:
        self._idle.clear()
        for process in list(self._all):
            await self._kill(process)
