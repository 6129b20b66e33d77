"""Reads videos, in a process of its own: what a hostile file makes of the decoder ends there, by a limit of memory or of time.

    python -m workers.preprocess.video_reader <descriptor of the pixel pool> <pyav or decord>

Jobs come by stdin and answers go by stdout, each a length (uint32) and a MessagePack. Frames are resized and written straight into the
pool. A file is named by its owner's descriptor, and stays open from one job to the next.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys

import msgspec
from PIL import Image

from pipeline.memory import HostMemory
from pipeline.parent import end_with_parent
from workers.preprocess.video import Video, VideoBroken, VideoMetadata
from workers.preprocess.video_files import open_video

MEMORY_LIMIT = 4 << 30  # bytes of address space, beside the pool's


class ReadJob(msgspec.Struct, frozen=True):
    """Without frames: what is it? Else these frames, resized, to this place in the pool, one after the other."""

    path: str
    is_new: bool  # not the file of the job before
    max_pixels: int  # of a frame as it is in the file
    frames: tuple[int, ...] = ()
    height: int = 0
    width: int = 0
    offset: int = 0


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`reason` is for clients; empty: the file is broken, in the decoder's words, which are not for them."""

    reason: str = ""


Answer = VideoMetadata | Done | Failed


class Reader:
    def __init__(self, pool: HostMemory, reader: str) -> None:
        self._pool, self._reader = pool, reader
        self._video: Video | None = None

    def handle(self, job: ReadJob) -> Answer:
        try:
            if job.is_new or self._video is None:
                self._video = None  # first: two at once would take twice the memory
                self._video = open_video(job.path, self._reader, job.max_pixels)
            return self._read(self._video, job)
        except VideoBroken as broken:
            return Failed(str(broken))
        except MemoryError:
            return Failed("the video takes too much memory")
        except Exception as error:  # noqa: BLE001  decoders raise anything on broken data
            sys.stderr.write(f"{type(error).__name__}: {error}"[:300] + "\n")
            return Failed()

    def _read(self, video: Video, job: ReadJob) -> Answer:
        if not job.frames:
            metadata = video.metadata
            return metadata if metadata.num_frames > 0 and 0 < metadata.fps < float("inf") else Failed()
        out = self._pool.array(job.offset, (len(job.frames), job.height, job.width, 3))
        for pixels, frame in zip(out, video.frames(job.frames), strict=True):
            pixels[:] = Image.fromarray(frame).resize((job.width, job.height), Image.Resampling.BICUBIC)
        return Done()


def main() -> None:
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group; whoever started us decides
    fd = int(sys.argv[1])
    limit = MEMORY_LIMIT + os.fstat(fd).st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    reader = Reader(HostMemory(fd, os.fstat(fd).st_size), sys.argv[2])
    while len(head := jobs.read(4)) == 4:
        job = msgspec.msgpack.decode(jobs.read(*struct.unpack("<I", head)), type=ReadJob)
        answer = msgspec.msgpack.encode(reader.handle(job))
        answers.write(struct.pack("<I", len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    main()
