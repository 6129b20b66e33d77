"""The libraries that decode videos, behind one protocol. Runs in reading processes (`reader_process.py`)."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import msgspec
import numpy as np
import numpy.typing as npt

# Containers that hold all that they show. FFmpeg also knows lists of other files, and would open these.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
TS_PACKET = 188
DEFAULT_READER = "decord" if platform.machine() == "x86_64" else "pyav"
Frame = npt.NDArray[Any]  # [height, width, 3] uint8


class VideoMetadata(msgspec.Struct, frozen=True, tag=True):
    num_frames: int
    fps: float
    height: int
    width: int


class VideoBroken(Exception):
    """The video cannot be read; the words are for clients."""


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


def open_video(path: str, reader: str, max_pixels: int) -> Video:
    """`reader` is pyav or decord. Raises VideoBroken, or whatever a decoder makes of broken data."""
    with open(path, "rb") as file:
        if not is_container(file.read(3 * TS_PACKET)):
            raise ValueError("no container of a known kind")
    video: Video = DecordVideo(path) if reader == "decord" else AvVideo(path)
    height, width = video.metadata.height, video.metadata.width
    if height * width > max_pixels:
        size = f"{width} x {height} pixels"
        raise VideoBroken(f"the video's frames have {size}, the limit is {max_pixels} in all")
    return video
