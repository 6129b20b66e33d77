from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pipeline.families import ImageSize, read_model_info
from pipeline.wire.errors import RequestError
from tests.pictures import encode, noise, scene, seen_size
from tests.reference import Reference
from tests.workers.preprocess.test_picture_files import chunk
from workers.preprocess.images import decode, read_size
from workers.preprocess.images import on_white as laid_on_white

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
        encode(photo(), "TIFF", compression="tiff_lzw"),
        encode(noise(1, (37, 411))),
        encode(scene(2).resize((20, 31))),
        encode(photo(), "WEBP"),
    ],
    ids=["png", "jpeg", "exif", "grey", "palette", "alpha", "tiff", "tall", "tiny", "webp"],
)
def test_pixels_are_those_of_hugging_face(data: bytes, random_checkpoint: Path) -> None:
    info = read_model_info(random_checkpoint)
    target = seen_size(read_size(data, LIMIT, ""), info)
    ours = decode(data, target, "")
    from PIL import ImageOps

    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    processor = Reference(random_checkpoint).processor
    processed = processor(images=[shown], do_rescale=False, do_normalize=False, return_tensors="np")
    grid = info.vision.grid_of(target)
    assert processed["image_grid_thw"].tolist() == [list(grid)]
    # Undo the processor's patches: rows and columns of merged patches, channel, two equal frames.
    patches = processed["pixel_values"].reshape(grid.h // 2, grid.w // 2, 2, 2, 3, 2, 14, 14)
    pixels = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(grid.h * 14, grid.w * 14, 3)
    assert np.array_equal(ours, pixels.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + b"\0\0\0\0IDAT"
        + bytes(8)
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"just some text, no picture at all", "not a picture"),
        (png_header(30_000, 30_000), "30000 x 30000"),
        (encode(Image.new("RGB", (1, 500))), "200"),
        (encode(Image.new("RGB", (500, 1))), "200"),
        (b"", "not a picture"),
        (b"\xff\xd8\xff", "AVIF, TIFF"),
        (b"II*\0", "not a picture"),
        (b"BM", "not a picture"),
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


# Transparency: what a person sees lies on white.

SIZE = ImageSize(112, 112)


def drawing(mode: str = "RGBA") -> Image.Image:
    """Opaque black in the middle of nothing, which hides black, and half of it half as dense."""
    image = Image.new("RGBA", (112, 112), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (30, 30, 80, 80))
    image.paste((0, 0, 0, 128), (30, 30, 80, 55))
    return image.convert(mode)


def on_white(is_binary: bool) -> np.ndarray:
    image = Image.new("RGB", (112, 112), "white")
    image.paste((0, 0, 0), (30, 30, 80, 80))
    image.paste((255,) * 3 if is_binary else (127,) * 3, (30, 30, 80, 55))
    return np.asarray(image)


def keyed(mode: str) -> Image.Image:
    """Black, with a grey or colour that is to be transparent around it."""
    image = Image.new("RGB", (112, 112), (85, 85, 85))
    image.paste((0, 0, 0), (30, 55, 80, 80))
    return image.convert(mode, dither=Image.Dither.NONE)


def palette_png(alphas: bytes | int) -> bytes:
    image = Image.new("P", (112, 112), 0)
    image.putpalette([85, 85, 85, 0, 0, 0, 0, 0, 0])
    image.paste(1, (30, 30, 80, 80))
    image.paste(2, (30, 30, 80, 55))
    return encode(image, transparency=alphas)


def palette_and_alpha() -> Image.Image:
    image = Image.new("PA", (112, 112), (0, 0))
    image.putpalette([0, 0, 0])
    image.putalpha(drawing().getchannel("A"))
    return image


def grey_png(depth: int, colour_type: int, samples: np.ndarray, clear: bytes) -> bytes:
    """A PNG [height, width, samples] of any depth, packed as the format has it, with a transparent colour."""
    height, width = samples.shape[:2]
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"tRNS", clear) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def plane(background: int, ink: int, channels: int = 1) -> np.ndarray:
    samples = np.full((112, 112, channels), background)
    samples[55:80, 30:80] = ink
    return samples


TRANSPARENT = {
    "png rgba": (lambda: encode(drawing()), False),
    "png la": (lambda: encode(drawing("LA")), False),
    "webp": (lambda: encode(drawing(), "WEBP", lossless=True, exact=True), False),
    "avif": (lambda: encode(drawing(), "AVIF", quality=100), False),
    "tiff": (lambda: encode(drawing(), "TIFF"), False),
    "tiff la": (lambda: encode(drawing("LA"), "TIFF"), False),
    "tiff packed": (lambda: encode(drawing(), "TIFF", compression="tiff_lzw"), False),
    "tiff pa": (lambda: encode(palette_and_alpha(), "TIFF"), False),
    "tiff premultiplied": (lambda: encode(drawing(), "TIFF", tiffinfo={338: 1}), False),
    "tiff la premultiplied": (lambda: encode(drawing("LA"), "TIFF", tiffinfo={338: 1}), False),
    "palette of alphas": (lambda: palette_png(b"\0\xff\x80"), False),
    "palette, one clear": (lambda: encode(keyed("P"), transparency=keyed("P").getpixel((0, 0))), True),
    "gif": (lambda: encode(keyed("P"), "GIF", transparency=keyed("P").getpixel((0, 0))), True),
    "grey": (lambda: encode(keyed("L"), transparency=85), True),
    "colours": (lambda: encode(keyed("RGB"), transparency=(85, 85, 85)), True),
    "1 bit": (lambda: grey_png(1, 0, plane(1, 0), b"\0\1"), True),
    "2 bits": (lambda: grey_png(2, 0, plane(1, 0), b"\0\1"), True),
    "4 bits": (lambda: grey_png(4, 0, plane(5, 0), b"\0\5"), True),
    "16 bits": (lambda: grey_png(16, 0, plane(21845, 0), struct.pack(">H", 21845)), True),
    "colours of 16 bits": (lambda: grey_png(16, 2, plane(21845, 0, 3), b"\x55" * 6), True),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_lies_on_white(name: str) -> None:
    make, is_binary = TRANSPARENT[name]
    data = make()
    pixels = decode(data, SIZE, "").astype(int)
    assert np.abs(pixels - on_white(is_binary)).max() <= (2 if "avif" not in name else 12)
    if name == "png rgba":  # as Qwen's own code does (qwen_vl_utils.vision_process.to_rgb)
        image = Image.open(io.BytesIO(data))
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.split()[3])
        assert np.array_equal(pixels, np.asarray(canvas))


def test_every_colour_lies_on_white_as_pillows_own_blending_has_it() -> None:
    """Which knows another way, of the same results."""
    alpha, colour = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.dstack([colour, colour, colour, alpha]))
    blended = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    assert np.array_equal(laid_on_white(image), blended.convert("RGB"))


def test_colours_are_laid_on_white_before_they_are_resized() -> None:
    """Else what is hidden would shine through along the edges."""
    image = Image.new("RGBA", (112, 112), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (31, 31, 81, 81))
    pixels = decode(encode(image), ImageSize(56, 56), "").astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 1]).max() == 0


def test_a_gif_whose_first_frame_covers_a_part_lies_on_white() -> None:
    data = bytearray(encode(Image.new("P", (40, 40), 1), "GIF"))
    data[6:10] = struct.pack("<HH", 112, 112)
    pixels = decode(bytes(data), SIZE, "")
    assert pixels[100, 100].tolist() == [255, 255, 255]
    assert pixels[10, 10].tolist() != [255, 255, 255]


def test_a_bmp_whose_fourth_byte_is_empty_is_no_empty_picture() -> None:
    image = drawing()
    image.putalpha(0)
    rows = np.asarray(image)[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, 112, 112, 1, 32, 3, len(rows), 0, 0, 0, 0) + masks
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + 108) + info.ljust(108, b"\0")
    assert Image.open(io.BytesIO(head + rows)).mode == "RGBA"
    assert decode(head + rows, SIZE, "").max() == 0, "black, as it is drawn"


def test_a_tiff_in_lab_is_seen_in_its_colours() -> None:
    from PIL import ImageCms

    colours = Image.new("RGB", (112, 112), (200, 40, 40))
    lab = ImageCms.profileToProfile(
        colours,
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    found = decode(encode(lab, "TIFF"), SIZE, "").astype(int)
    assert np.abs(found - (200, 40, 40)).max() < 6


# Grey of more than 8 bits.


def ramp() -> Image.Image:
    return Image.fromarray(np.arange(112 * 112).reshape(112, 112).astype(np.uint8))


def wide(dtype: str, scale: float) -> Image.Image:
    return Image.fromarray((np.asarray(ramp()).astype(np.float64) * scale).astype(dtype))


def big_endian() -> Image.Image:
    values = np.asarray(ramp()).astype(">u2") * 257
    return Image.frombytes("I;16B", (112, 112), values.astype(">u2").tobytes())


def min_is_white() -> bytes:
    return encode(Image.fromarray((255 - np.asarray(ramp()).astype("<u2")) * 257), "TIFF", tiffinfo={262: 0})


WIDE = {
    "png 16": lambda: encode(wide("<u2", 257)),
    "tiff 16": lambda: encode(wide("<u2", 257), "TIFF"),
    "tiff 16 packed": lambda: encode(wide("<u2", 257), "TIFF", compression="tiff_adobe_deflate"),
    "tiff 16 big endian": lambda: encode(big_endian(), "TIFF"),
    "tiff 16, 0 is white": min_is_white,
    "tiff 32": lambda: encode(wide("<i4", 257), "TIFF"),
    "tiff 32, values of 8 bits": lambda: encode(wide("<i4", 1), "TIFF"),
    "tiff 32, its range": lambda: encode(wide("<i4", 8_000_000), "TIFF"),
    "fractions to 1": lambda: encode(wide("<f4", 1 / 255), "TIFF"),
    "fractions to 255": lambda: encode(wide("<f4", 1), "TIFF"),
    "fractions to 65535": lambda: encode(wide("<f4", 257), "TIFF"),
    "fractions, their range": lambda: encode(wide("<f4", -1e6), "TIFF"),
}


@pytest.mark.parametrize("name", WIDE)
def test_grey_of_more_bits_is_that_of_eight(name: str) -> None:
    expected = decode(encode(ramp()), SIZE, "")
    found = decode(WIDE[name](), SIZE, "")
    if name == "fractions, their range":
        found = 255 - found
    assert np.array_equal(found, expected)


def test_a_number_that_is_none_spoils_its_own_pixel_only() -> None:
    values = np.asarray(ramp()).astype("<f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    found = decode(encode(Image.fromarray(values), "TIFF"), SIZE, "")
    assert np.array_equal(found[1:], decode(encode(ramp()), SIZE, "")[1:])


# A JPEG that lacks its end.


ENCODINGS = [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"quality": 98, "subsampling": 0}]


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
@pytest.mark.parametrize("behind", [b"", b"\xff"])
def test_a_jpeg_that_lacks_only_its_end_mark_is_whole(options: dict[str, object], behind: bytes) -> None:
    data = encode(photo().resize((203, 177)), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    expected = decode(data, SIZE, "")
    assert read_size(data[:-2] + behind, LIMIT, "") == (177, 203)
    assert np.array_equal(decode(data[:-2] + behind, SIZE, ""), expected)


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
def test_a_jpeg_that_lacks_more_is_refused(options: dict[str, object]) -> None:
    data = encode(photo().resize((203, 177)), "JPEG", **options)
    for lost in (40, 100, 400, 1000, len(data) // 2):
        with pytest.raises(RequestError, match="cannot be decoded"):
            decode(data[:-lost], SIZE, "")
