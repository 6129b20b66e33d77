"""Animated pictures (GIF, WebP, APNG) as videos, by Pillow. What is transparent lies on white."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from workers.preprocess.video import Frame, VideoBroken, VideoMetadata, check_size

SHORTEST_MS = 20.0  # a frame that is to be shown for less ...
USUAL_MS = 100.0  # ... is shown for so long, as browsers do


class Animation:
    """`kind` is Pillow's name of the format. Raises VideoBroken for a still picture."""

    def __init__(self, path: str, kind: str, max_pixels: int) -> None:
        self._path, self._kind = path, kind
        self._image = self._open()
        check_size(self._image.width, self._image.height, max_pixels)
        if not getattr(self._image, "is_animated", False):
            raise VideoBroken("a picture that does not move is no video: send it as an image_url")

    @cached_property
    def metadata(self) -> VideoMetadata:
        """Decodes all frames: the header's count may be more than there are."""
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
            try:
                self._image.seek(number)
                self._image.load()
            except (EOFError, OSError, SyntaxError):
                raise VideoBroken(f"the video is broken: frame {number} cannot be decoded") from None
            yield on_white(self._image)

    def _open(self) -> Image.Image:
        try:
            return Image.open(self._path, formats=(self._kind,))
        except Image.DecompressionBombError:
            raise VideoBroken("the video's frames have too many pixels") from None

    def _decoded(self) -> Iterator[Image.Image]:
        """All frames, up to the first that is broken."""
        number = 0
        while True:
            try:
                self._image.seek(number)
                self._image.load()
            except (EOFError, OSError, SyntaxError):
                return
            yield self._image
            number += 1


def on_white(image: Image.Image) -> Frame:
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
