"""Reads videos, in a process of its own: what a hostile file makes of the decoder ends there, by a limit of memory or of time.

    python -m workers.preprocess.video_reader <descriptor of the pixel pool>

Jobs come by stdin and answers go by stdout, each a length (uint32) and a MessagePack. Frames are resized and written straight into the
pool. A file is named by its owner's descriptor, and stays open from one job to the next.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.memory import HostMemory
from pipeline.parent import end_with_parent

MEMORY_LIMIT = 4 << 30  # bytes of address space, beside the pool's
# Containers that hold all that they show. FFmpeg also knows lists of other files, and would open these.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
TS_PACKET = 188
Frame = npt.NDArray[Any]  # [height, width, 3] uint8


class VideoMetadata(msgspec.Struct, frozen=True, tag=True):
    num_frames: int
    fps: float
    height: int
    width: int


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


class Video(Protocol):
    metadata: VideoMetadata

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]: ...


class DecordVideo:
    def __init__(self, path: str) -> None:
        import decord  # type: ignore[import-untyped]

        self._reader = decord.VideoReader(path, num_threads=1)
        height, width, _ = self._reader[0].shape
        self.metadata = VideoMetadata(len(self._reader), float(self._reader.get_avg_fps()), height, width)

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        for number in numbers:  # one by one: a batch of large frames would be in memory at once
            yield self._reader[number].asnumpy()


class AvVideo:
    """Where decord has no package. A frame is found by its time: back to the key frame before it, unless it is just ahead."""

    def __init__(self, path: str) -> None:
        import av  # type: ignore[import-not-found,unused-ignore]

        self._container = cast(Any, av.open(path, options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}))
        self._stream = self._container.streams.video[0]
        packets = [packet for packet in self._container.demux(self._stream) if packet.pts is not None]
        self._times = sorted(packet.pts for packet in packets)
        self._keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
        self._at: int | None = None  # time of the frame that came last
        self._decoded: Iterator[Any] = iter(())
        first = next(self.frames([0]))
        duration = float((self._times[-1] - self._times[0]) * self._stream.time_base) if len(packets) > 1 else 0.0
        rate = self._stream.average_rate or self._stream.guessed_rate
        fps = float(rate) if rate else (len(packets) - 1) / duration if duration else 1.0
        self.metadata = VideoMetadata(len(packets), fps, *first.shape[:2])

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        for number in numbers:
            time = self._times[number]
            if self._at is None or time <= self._at or any(self._at < key <= time for key in self._keys):
                self._container.seek(time, stream=self._stream)
                self._decoded = self._container.decode(self._stream)
            frame = next(frame for frame in self._decoded if frame.pts is not None and frame.pts >= time)
            self._at = frame.pts
            image = frame.to_ndarray(format="rgb24")
            yield np.rot90(image, frame.rotation // 90) if frame.rotation % 360 else image


def is_container(head: bytes) -> bool:
    """Whether a file begins as one of `FORMATS` does."""
    return (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or head.startswith((b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"0&\xb2u\x8ef\xcf\x11"))
        or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")
        or (len(head) > 2 * TS_PACKET and all(head[index * TS_PACKET] == 0x47 for index in range(3)))
    )


def open_video(path: str) -> Video:
    with open(path, "rb") as file:
        if not is_container(file.read(3 * TS_PACKET)):
            raise ValueError("no container of a known kind")
    return DecordVideo(path) if platform.machine() == "x86_64" else AvVideo(path)


class Reader:
    def __init__(self, pool: HostMemory) -> None:
        self._pool = pool
        self._video: Video | None = None

    def handle(self, job: ReadJob) -> Answer:
        try:
            if job.is_new or self._video is None:
                self._video = None  # first: two at once would take twice the memory
                self._video = open_video(job.path)
            return self._read(self._video, job)
        except MemoryError:
            return Failed("the video takes too much memory")
        except Exception as error:  # noqa: BLE001  decoders raise anything on broken data
            sys.stderr.write(f"{type(error).__name__}: {error}"[:300] + "\n")
            return Failed()

    def _read(self, video: Video, job: ReadJob) -> Answer:
        metadata = video.metadata
        if metadata.height * metadata.width > job.max_pixels:
            return Failed(f"the video's frames have {metadata.width} x {metadata.height} pixels, the limit is {job.max_pixels} in all")
        if not job.frames:
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
    reader = Reader(HostMemory(fd, os.fstat(fd).st_size))
    while len(head := jobs.read(4)) == 4:
        job = msgspec.msgpack.decode(jobs.read(*struct.unpack("<I", head)), type=ReadJob)
        answer = msgspec.msgpack.encode(reader.handle(job))
        answers.write(struct.pack("<I", len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    main()
