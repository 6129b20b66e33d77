"""Pictures: limits judged by the header, then decoding and resizing exactly as Hugging Face's Qwen2-VL processor does."""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.errors import RequestError
from pipeline.families import MAX_ASPECT_RATIO, VisionInfo
from pipeline.messages import GridTHW

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap the sides
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked on the header, before Pillow would


class ImageSize(NamedTuple):
    height: int
    width: int


def read_size(data: bytes | memoryview, max_source_pixels: int, field: str) -> ImageSize:
    """Height and width as shown, from the header alone. Raises RequestError for what is no picture, or too large or too thin."""
    image = _open(data, field)
    width, height = image.size
    if width * height > max_source_pixels:
        raise RequestError(f"the picture has {width} x {height} pixels, the limit is {max_source_pixels} in all", field=field)
    size = ImageSize(width, height) if _orientation(image) in (5, 6, 7, 8) else ImageSize(height, width)
    check_aspect(size, field)
    return size


def check_aspect(size: ImageSize, field: str) -> None:
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise RequestError(f"it has {size.width} x {size.height} pixels: the sides may differ by a factor of {MAX_ASPECT_RATIO} at most", field=field)


def decode(data: bytes | memoryview, target: ImageSize, field: str) -> npt.NDArray[Any]:
    """RGB pixels [height, width, 3] uint8 of the picture, resized to `target`. Raises RequestError when it is broken."""
    image = _open(data, field)
    try:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        image = image.convert("RGB")
        return np.asarray(image.resize((target.width, target.height), Image.Resampling.BICUBIC))
    except MemoryError:
        raise RequestError("the picture takes more memory than this server gives to one", field=field, status=503) from None
    except Exception:  # noqa: BLE001  decoders raise anything on broken data, and their words are not for clients
        raise RequestError("the picture cannot be decoded", field=field) from None


def _orientation(image: Image.Image) -> int:
    """How the picture is to be turned, from its header; 1 is upright, and so is a picture whose EXIF is broken."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look for a chunk behind its data
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  EXIF comes from outside, and Pillow raises anything on broken ones
        return 1


def _open(data: bytes | memoryview, field: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # noqa: BLE001  decoders raise anything on broken data
        raise RequestError(f"the media is not a picture of a known kind ({', '.join(FORMATS)})", field=field) from None


def smart_resize(size: ImageSize, factor: int, min_pixels: int, max_pixels: int) -> ImageSize:
    """The size at which the model sees a picture: sides are multiples of `factor`, the area within the limits, the aspect kept.

    As Qwen2-VL's processor has it (`smart_resize`), the rounding of Python's `round` included.
    """
    height, width = (round(side / factor) * factor for side in size)
    if height * width > max_pixels:
        shrink = math.sqrt(size.height * size.width / max_pixels)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    elif height * width < min_pixels:
        grow = math.sqrt(min_pixels / (size.height * size.width))
        height, width = (math.ceil(side * grow / factor) * factor for side in size)
    return ImageSize(height, width)


def grid_of(size: ImageSize, info: VisionInfo) -> GridTHW:
    return GridTHW(1, size.height // info.patch_size, size.width // info.patch_size)
