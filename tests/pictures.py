"""Pictures for tests: drawn scenes, noise, and real photos."""

from __future__ import annotations

import base64
import io
import random

import numpy as np
from PIL import Image

from pipeline.families import AreaLimits, ImageSize, ModelInfo
from tools.tiny_model.scenes import draw, make_scene


def scene(seed: int, size: tuple[int, int] = (112, 112)) -> Image.Image:
    return draw(make_scene(random.Random(seed)), size)


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def limits(info: ModelInfo) -> AreaLimits:
    """Of a picture without settings of its own."""
    return AreaLimits(info.vision.min_pixels, info.vision.max_pixels)


def seen_size(size: ImageSize, info: ModelInfo) -> ImageSize:
    """At which a picture without settings of its own is seen."""
    return info.family.picture_size(size, limits(info), info)


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(image)).decode()
