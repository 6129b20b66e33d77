"""Pictures: limits checked by the header, decoded as a viewer shows them, resized as Qwen's processors do.

As a viewer shows them: upright, transparency on white, and 16-bit grey scaled to 8 bits. Qwen's own code
(qwen-vl-utils) passes the same pixels to Hugging Face's processor, whose resizing is matched exactly; that
processor alone would uncover colours under transparency.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, GifImagePlugin, Image, ImageChops, ImageCms, ImageOps

from pipeline.families import MAX_ASPECT_RATIO, ImageSize
from pipeline.wire.errors import RequestError
from workers.preprocess.orientation import SWAPS_SIDES, TURNS, orientation
from workers.preprocess.picture_files import END_OF_JPEG, Structure, not_a_picture, walk

Image.MAX_IMAGE_PIXELS = None  # `max_source_pixels` is checked first, on the header
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several processes decode at once
WHITE = 255
WIDE_MODES = ("I", "F")  # first letters of modes with more than 8 bits of grey
TO_8_BITS = [(value + 128) // 257 for value in range(1 << 16)]
MIN_IS_WHITE = 0  # of a TIFF's tag 262
# Without a JPEG marker and without a pattern: a picture into which it is decoded depends on it.
PADDING = bytes((37 * number * number + 11) % 251 for number in range(64))


def read_size(data: bytes | memoryview, max_source_pixels: int, field: str) -> ImageSize:
    """Height and width as shown, by the header. Raises RequestError for no picture, too large or too thin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata
        structure, image = _open(data, max_source_pixels, field)
    width, height = image.size
    is_turned = orientation(structure, image) in SWAPS_SIDES
    size = ImageSize(width, height) if is_turned else ImageSize(height, width)
    check_aspect(size, field)
    return size


def _check_pixels(width: int, height: int, limit: int, field: str) -> None:
    if width * height > limit:
        pixels = f"{width} x {height} pixels"
        raise RequestError(f"the picture has {pixels}, the limit is {limit} in all", field=field)


def check_aspect(size: ImageSize, field: str) -> None:
    if max(size) > MAX_ASPECT_RATIO * min(size):
        limit = f"the sides may differ by a factor of {MAX_ASPECT_RATIO} at most"
        raise RequestError(f"it has {size.width} x {size.height} pixels: {limit}", field=field)


def decode(
    data: bytes | memoryview,
    target: ImageSize,
    field: str,
    max_source_pixels: int = sys.maxsize,
) -> npt.NDArray[Any]:
    """RGB pixels [height, width, 3] uint8, resized. Raises RequestError (broken), and MemoryError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata
        structure, image = _open(data, max_source_pixels, field)
        return _decode(data, structure, image, target, field)


def _decode(
    data: bytes | memoryview,
    structure: Structure,
    image: Image.Image,
    target: ImageSize,
    field: str,
) -> npt.NDArray[Any]:
    try:
        turn = TURNS.get(orientation(structure, image))
        shown = _flatten(_whole(data, structure) if structure.lacks_end else image, structure)
        if turn is not None:
            shown = shown.transpose(turn)
        return np.asarray(shown.resize((target.width, target.height), Image.Resampling.BICUBIC))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  decoders raise anything on broken data; their messages are not for clients
        raise RequestError("the picture cannot be decoded", field=field) from None


def _open(data: bytes | memoryview, max_source_pixels: int, field: str) -> tuple[Structure, Image.Image]:
    """Checks structure and header, and decodes nothing."""
    structure = walk(data, field)
    if structure.webp_size is not None:
        _check_pixels(*structure.webp_size, max_source_pixels, field)
    try:
        image = Image.open(io.BytesIO(data), formats=(structure.kind,))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  decoders raise anything on broken data
        raise not_a_picture(field) from None
    _check_pixels(*image.size, max_source_pixels, field)
    return structure, image


def _whole(data: bytes | memoryview, structure: Structure) -> Image.Image:
    """A JPEG that lacks only its end marker. Raises ValueError where pixels are missing, too.

    libjpeg fills missing pixels without an error. It reads beyond the data only if these end too early; so
    the file is decoded with two different paddings, and must give the same picture.
    """
    body = bytes(data).rstrip(b"\xff")
    files = [io.BytesIO(body + end + END_OF_JPEG) for end in (b"", PADDING)]
    images = [Image.open(file, formats=(structure.kind,)) for file in files]
    if ImageChops.difference(*images).getbbox() is not None:
        raise ValueError("the data end before the picture does")
    return images[0]


def _flatten(image: Image.Image, structure: Structure) -> Image.Image:
    """Converts to RGB, transparency on white."""
    if image.mode.startswith(WIDE_MODES):
        return _flatten_grey(image).convert("RGB")
    box = image.tile[0][1] if isinstance(image, GifImagePlugin.GifImageFile) else None
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        image = _from_lab(image)
    elif image.mode == "RGBA" and structure.kind == "BMP" and image.getchannel("A").getextrema() == (0, 0):
        image = image.convert("RGB")  # many programs leave the fourth byte empty
    if structure.kind == "PNG":
        _scale_transparency(image, structure.png_depth)
    shown = on_white(image)
    if box is not None and box != (0, 0, *image.size):  # a GIF's first frame need not cover its canvas
        canvas = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
        canvas.paste(shown.crop(box), box)
        return canvas
    return shown


def on_white(image: Image.Image) -> Image.Image:
    """Converts to RGB, transparency on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    shown = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
    shown.paste(seen, mask=seen.getchannel("A"))
    return shown


def _from_lab(image: Image.Image) -> Image.Image:
    """Converts CIE L*a*b*, which a TIFF may hold, to sRGB."""
    shown = ImageCms.profileToProfile(
        image,
        ImageCms.createProfile("LAB"),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    assert shown is not None
    return shown


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Scales a PNG's transparent colour from the file's samples to Pillow's 8 bits."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int) and depth < 8:
        image.info["transparency"] = colour * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and isinstance(colour, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _flatten_grey(image: Image.Image) -> Image.Image:
    """Scales grey of more than 8 bits to 8; a PNG's transparent value becomes white."""
    is_inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == MIN_IS_WHITE
    grey = _to_8_bits(image)
    if is_inverted:
        grey = ImageOps.invert(grey)
    clear = image.info.get("transparency")
    if isinstance(clear, int) and 0 <= clear < 1 << 16:
        mask = [WHITE] * (1 << 16)
        mask[clear] = 0
        shown = Image.new("L", image.size, WHITE)
        shown.paste(grey, mask=image.convert("I").point(mask, "L"))
        return shown
    return grey


def _to_8_bits(image: Image.Image) -> Image.Image:
    """White is 65535 for 16 bits. Formats of 32 bits and of fractions do not define it: white is the smallest
    of 1 (fractions only), 255 and 65535 that no value exceeds. With values beyond these, or below 0, the
    largest value is white and the smallest black.
    """
    if image.mode.startswith("I;16"):
        return image.convert("I").point(TO_8_BITS, "L")
    values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and low >= 0 and 255 < high < 1 << 16:
        return image.point(TO_8_BITS, "L")
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0,)
    white = next((white for white in whites if high <= white), None)
    if white is None or low < 0:
        black, white = low, max(high, low + 1e-9)
    else:
        black = 0.0
    out = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # row by row: all at once would take four times the memory
        out[row] = np.rint((line.astype(np.float64) - black) * (WHITE / (white - black)))
    return Image.fromarray(out)
