"""The contract of video readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy.typing as npt

Frame = npt.NDArray[Any]  # [height, width, 3] uint8


class VideoMetadata(msgspec.Struct, frozen=True, tag=True):
    num_frames: int
    fps: float
    height: int
    width: int


class Video(Protocol):
    """An open file. Frames are numbered as decoding the whole file gives them."""

    @property
    def metadata(self) -> VideoMetadata: ...

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        """One by one, in the given order. Raises VideoBroken for a frame that cannot be decoded."""


class VideoBroken(Exception):
    """The video cannot be read; the message is for clients."""


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise VideoBroken(f"the video's frames have {size}, the limit is {max_pixels} in all")
