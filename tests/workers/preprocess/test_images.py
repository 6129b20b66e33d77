from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pipeline.errors import RequestError
from pipeline.families import read_model_info
from tests.pictures import encode, limits, noise, scene
from tests.reference import Reference
from workers.preprocess.images import ImageSize, decode, grid_of, read_size, smart_resize

LIMIT = 64_000_000


def photo() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return encode(photo().crop((0, 0, 400, 200)), "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize(
    "data",
    [
        encode(photo()),
        encode(photo(), "JPEG", quality=80),
        rotated_jpeg(),
        encode(photo().convert("L")),
        encode(photo().convert("P")),
        encode(photo().convert("RGBA")),
        encode(noise(1, (37, 411))),
        encode(scene(2).resize((20, 31))),
        encode(photo(), "WEBP"),
    ],
    ids=["png", "jpeg", "exif", "grey", "palette", "alpha", "tall", "tiny", "webp"],
)
def test_pixels_are_those_of_hugging_face(data: bytes, random_checkpoint: Path) -> None:
    info = read_model_info(random_checkpoint).vision
    target = smart_resize(read_size(data, LIMIT, ""), *limits(info))
    ours = decode(data, target, "")
    from PIL import ImageOps

    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    processor = Reference(random_checkpoint).processor
    processed = processor(images=[shown], do_rescale=False, do_normalize=False, return_tensors="np")
    grid = grid_of(target, info)
    assert processed["image_grid_thw"].tolist() == [list(grid)]
    # Undo the processor's patches: rows and columns of merged patches, channel, two equal frames.
    patches = processed["pixel_values"].reshape(grid.h // 2, grid.w // 2, 2, 2, 3, 2, 14, 14)
    pixels = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(grid.h * 14, grid.w * 14, 3)
    assert np.array_equal(ours, pixels.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT" + bytes(8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"just some text, no picture at all", "not a picture"),
        (png_header(30_000, 30_000), "30000 x 30000"),
        (encode(Image.new("RGB", (1, 500))), "200"),
        (encode(Image.new("RGB", (500, 1))), "200"),
        (b"", "not a picture"),
    ],
)
def test_what_is_no_fitting_picture_is_refused_by_its_header(data: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_size(data, LIMIT, "messages[0].content[1].image_url")
    assert caught.value.info.field == "messages[0].content[1].image_url"
    assert caught.value.info.status == 400


def test_a_truncated_picture_is_refused_without_the_decoders_words() -> None:
    data = encode(noise(3, (200, 200)))[:2000]
    size = read_size(data, LIMIT, "f")
    with pytest.raises(RequestError) as caught:
        decode(data, ImageSize(28, 28), "f")
    assert size == (200, 200)
    assert caught.value.info.message == "the picture cannot be decoded"


@pytest.mark.parametrize("size", [(28, 28), (1, 200), (200, 1), (56, 57), (1000, 999), (4000, 21), (14, 14), (43, 42), (70, 98)])
def test_resized_sizes_are_those_of_hugging_face(size: tuple[int, int], random_checkpoint: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    info = read_model_info(random_checkpoint).vision
    expected = reference(*size, factor=28, min_pixels=info.min_pixels, max_pixels=info.max_pixels)
    assert smart_resize(ImageSize(*size), *limits(info)) == expected
    assert expected[0] * expected[1] <= info.largest_pixels


def test_no_size_passes_the_bound_on_resized_pixels(random_checkpoint: Path) -> None:
    info = read_model_info(random_checkpoint).vision
    rng = np.random.default_rng(0)
    for _ in range(5000):
        side = int(2 ** rng.uniform(0, 13))
        other = max(1, int(side * rng.uniform(1 / 200, 1)))
        size = ImageSize(side, other) if rng.random() < 0.5 else ImageSize(other, side)
        if max(size) <= 200 * min(size):
            for low in (info.min_pixels, info.max_pixels):  # a request may ask for at least as much as the server allows at most
                resized = smart_resize(size, info.factor, low, info.max_pixels)
                assert resized.height * resized.width <= info.largest_pixels, size
