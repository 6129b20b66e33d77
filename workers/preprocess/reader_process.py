"""Reads media in a process of its own, with limits on memory and time, since a hostile file may exploit a
decoder.

    python -m workers.preprocess.reader_process <pixel pool> <inbox> <MiB of memory> <pyav or decord>

The first two are descriptors of memory files. Jobs come on stdin, answers go to stdout, each as a length
(uint32) and a MessagePack. A picture's bytes lie in the inbox. A video is opened through its owner's
descriptor, and stays open for later jobs. Pixels are resized and written straight into the pool. SIGPROF ends
this process when a job exceeds its processor time; the time of other processes does not count.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import warnings
from typing import assert_never

import msgspec
from PIL import Image

from pipeline.families import ImageSize
from pipeline.process.parent import end_with_parent
from pipeline.transport.memory import HostMemory
from pipeline.wire.errors import RequestError
from workers.preprocess.child_limits import has_met_its_limit, limit_memory
from workers.preprocess.images import decode, read_size
from workers.preprocess.shortages import NO_ROOM, is_shortage
from workers.preprocess.video import Video, VideoBroken, VideoMetadata
from workers.preprocess.video_files import open_video


class PictureJob(msgspec.Struct, frozen=True, tag=True):
    """The picture in the first `nbytes` of the inbox: without a size, asks for that, else for its pixels."""

    nbytes: int
    cpu_s: float
    max_pixels: int  # of the picture in the file
    height: int = 0
    width: int = 0
    offset: int = 0


class VideoJob(msgspec.Struct, frozen=True, tag=True):
    """Without frames, asks for the metadata; else for the pixels of these frames, at `offset` in the pool."""

    path: str
    is_new: bool  # another file than in the job before
    cpu_s: float
    max_pixels: int  # of a frame in the file
    frames: tuple[int, ...] = ()
    height: int = 0
    width: int = 0
    offset: int = 0


Job = PictureJob | VideoJob


class PictureSize(msgspec.Struct, frozen=True, tag=True):
    """As the picture is shown."""

    height: int
    width: int


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`reason` is for clients. Empty for a broken file: a decoder's message is not for clients."""

    reason: str = ""
    status: int = 400


Answer = VideoMetadata | PictureSize | Done | Failed


class Reader:
    def __init__(self, pool: HostMemory, inbox: int, memory_mib: int, video_reader: str) -> None:
        self._pool, self._inbox, self._memory_mib, self._video_reader = pool, inbox, memory_mib, video_reader
        self._video: Video | None = None

    def handle(self, job: Job) -> Answer:
        try:
            match job:
                case PictureJob():
                    return self._read_picture(job)
                case VideoJob():
                    return self._read_video(job)
                case _:
                    assert_never(job)
        except MemoryError:
            self._video = None
            if not has_met_its_limit():
                return Failed(NO_ROOM, 503)
            limit = f"the {self._memory_mib} MiB of memory that this server gives to one"
            kind = "picture" if isinstance(job, PictureJob) else "video"
            return Failed(f"the {kind} takes more than {limit}")
        except RequestError as refusal:
            return Failed(refusal.info.message)
        except VideoBroken as broken:
            return Failed(str(broken))
        except Exception as error:  # noqa: BLE001  decoders raise anything on broken data
            sys.stderr.write(f"{type(error).__name__}: {error}"[:300] + "\n")
            # EAGAIN says here that a demultiplexer wants to be called again: that is the file's.
            lacks = is_shortage(error) and not isinstance(error, BlockingIOError)
            return Failed(NO_ROOM, 503) if lacks else Failed()

    def _read_picture(self, job: PictureJob) -> Answer:
        self._video = None  # two at once would take twice the memory
        data = os.pread(self._inbox, job.nbytes, 0)
        if not job.height:
            return PictureSize(*read_size(data, job.max_pixels, ""))
        out = self._pool.array(job.offset, (job.height, job.width, 3))
        out[:] = decode(data, ImageSize(job.height, job.width), "", job.max_pixels)
        return Done()

    def _read_video(self, job: VideoJob) -> Answer:
        if job.is_new or self._video is None:
            self._video = None  # first: two at once would take twice the memory
            self._video = open_video(job.path, self._video_reader, job.max_pixels)
        if not job.frames:
            metadata = self._video.metadata
            is_playable = metadata.num_frames > 0 and 0 < metadata.fps < float("inf")
            return metadata if is_playable else Failed()
        out = self._pool.array(job.offset, (len(job.frames), job.height, job.width, 3))
        for pixels, frame in zip(out, self._video.frames(job.frames), strict=True):
            pixels[:] = Image.fromarray(frame).resize((job.width, job.height), Image.Resampling.BICUBIC)
        return Done()


def main() -> None:
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; preprocess ends this process
    warnings.simplefilter("ignore")  # of Pillow, about metadata
    pool_fd, inbox, memory_mib = map(int, sys.argv[1:4])
    jobs, answers = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # output of decoders goes to stderr
    reader = Reader(HostMemory(pool_fd, os.fstat(pool_fd).st_size), inbox, memory_mib, sys.argv[4])
    limit_memory(memory_mib)
    while len(head := jobs.read(4)) == 4:
        job = msgspec.msgpack.decode(jobs.read(*struct.unpack("<I", head)), type=Job)
        signal.setitimer(signal.ITIMER_PROF, job.cpu_s)
        answer = msgspec.msgpack.encode(reader.handle(job))
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            os.write(answers, struct.pack("<I", len(answer)) + answer)  # in one call
        except BrokenPipeError:
            return  # preprocess has died, and the signal of `end_with_parent` is still to come


if __name__ == "__main__":
    main()
