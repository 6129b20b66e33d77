"""Animated pictures (GIF, WebP, APNG) as videos, by Pillow. Transparency becomes white."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from workers.preprocess.images import on_white
from workers.preprocess.video import Frame, VideoBroken, VideoMetadata, check_size

SHORTEST_MS = 20.0  # a frame with a shorter duration ...
USUAL_MS = 100.0  # ... gets this one, as in browsers
WEBP_ALPHA = 0x10
# Pillow's exceptions for broken data.
BROKEN = (
    EOFError,
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Animation:
    """`kind` is Pillow's name of the format. Raises VideoBroken for a still picture."""

    def __init__(self, path: str, kind: str, max_pixels: int) -> None:
        self._path, self._kind, self._max_pixels = Path(path), kind, max_pixels
        self._image = self._open()
        check_size(self._image.width, self._image.height, max_pixels)
        if not getattr(self._image, "is_animated", False):
            raise VideoBroken("a picture that does not move is no video: send it as an image_url")

    @cached_property
    def metadata(self) -> VideoMetadata:
        """Decodes all frames, since the header's count may be too high."""
        num_frames, total_ms = 0, 0.0
        for image in self._decoded():
            duration_ms = float(image.info.get("duration") or 0)
            total_ms += duration_ms if duration_ms >= SHORTEST_MS else USUAL_MS
            num_frames += 1
        if not num_frames:
            raise VideoBroken("the media is not a video that can be decoded")
        return VideoMetadata(num_frames, 1000 * num_frames / total_ms, self._image.height, self._image.width)

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        for number in numbers:
            if number < self._image.tell():
                self._image = self._open()
            try:
                # Each frame is drawn onto the one before it.
                for step in range(self._image.tell(), number + 1):
                    self._go_to(step)
            except BROKEN:
                self._image = self._open()
                raise VideoBroken(f"the video is broken: frame {number} cannot be decoded") from None
            yield np.asarray(on_white(self._image))

    def _open(self) -> Image.Image:
        data = self._path.read_bytes()
        if self._kind == "WEBP" and data[12:16] == b"VP8X" and len(data) > 20:
            # With the alpha flag set, canvas that no frame covers is transparent, not black.
            data = b"".join((data[:20], bytes([data[20] | WEBP_ALPHA]), data[21:]))
        try:
            return Image.open(io.BytesIO(data), formats=(self._kind,))
        except Image.DecompressionBombError:
            raise VideoBroken("the video's frames have too many pixels") from None

    def _go_to(self, number: int) -> None:
        self._image.seek(number)
        self._image.load()
        check_size(self._image.width, self._image.height, self._max_pixels)

    def _decoded(self) -> Iterator[Image.Image]:
        """All frames, up to the first that is broken."""
        self._image = self._open()
        for number in itertools.count():
            try:
                self._go_to(number)
            except BROKEN:
                break
            yield self._image
        self._image = self._open()
