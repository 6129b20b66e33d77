"""Files of pictures: what is refused for its structure before a decoder sees it, and what turns a picture."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.families import ImageSize
from pipeline.wire.errors import RequestError
from tests.pictures import encode, noise, scene
from workers.preprocess import picture_files
from workers.preprocess.images import decode, read_size
from workers.preprocess.picture_files import walk

LIMIT = 64_000_000
MIB = 1 << 20
SIDE = ImageSize(56, 84)


def corner(kind: str = "PNG", **options: object) -> bytes:
    """Wider than high, each quarter of another colour."""
    image = Image.new("RGB", (96, 64), "white")
    for place, colour in (((0, 0), "red"), ((48, 0), "green"), ((0, 32), "blue")):
        image.paste(colour, (*place, place[0] + 48, place[1] + 32))
    return encode(image, kind, **options)


def jpeg(**options: object) -> bytes:
    return corner("JPEG", quality=95, **options)


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(png: bytes, added: bytes, is_behind: bool = False) -> bytes:
    at = len(png) - 12 if is_behind else 33
    return png[:at] + added + png[at:]


def with_text(kind: bytes, text: bytes) -> bytes:
    return with_chunk(corner(), chunk(kind, b"Raw profile type " + text))


def segment(code: int, body: bytes) -> bytes:
    return bytes((0xFF, code)) + struct.pack(">H", len(body) + 2) + body


def with_segment(jpeg: bytes, added: bytes) -> bytes:
    return jpeg[:2] + added + jpeg[2:]


def attribute(value: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % value


def element(value: int) -> bytes:
    return b"<rdf:Description><tiff:Orientation>%d</tiff:Orientation></rdf:Description>" % value


def other_prefix(value: int) -> bytes:
    return b"<r xmlns:t='http://ns.adobe.com/tiff/1.0/' t:Orientation = '%d'/>" % value


def utf_16(text: bytes) -> bytes:
    return text.decode().encode("utf-16")


def raw_profile(name: bytes, profile: bytes) -> bytes:
    digits = profile.hex().encode()
    lines = b"\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return b"\n%b\n%8d\n%b\n" % (name, len(profile), lines)


def itxt(text: bytes, is_packed: bool = False) -> bytes:
    body = zlib.compress(text) if is_packed else text
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes((is_packed, 0)) + b"\0\0" + body)


PLAIN_EXIF = exif(6)[6:]
XAP = b"http://ns.adobe.com/xap/1.0/\0"
TURNED: dict[str, Callable[[], bytes]] = {
    "jpeg exif": lambda: jpeg(exif=exif(6)),
    "jpeg xmp attribute": lambda: with_segment(jpeg(), segment(0xE1, XAP + attribute(6))),
    "jpeg xmp element": lambda: with_segment(jpeg(), segment(0xE1, XAP + element(6))),
    "jpeg xmp, another prefix": lambda: with_segment(jpeg(), segment(0xE1, XAP + other_prefix(6))),
    "jpeg xmp utf-16": lambda: with_segment(jpeg(), segment(0xE1, XAP + utf_16(attribute(6)))),
    "jpeg exif before xmp": lambda: with_segment(jpeg(exif=exif(6)), segment(0xE1, XAP + attribute(3))),
    "png exif": lambda: corner(exif=exif(6)),
    "png exif behind the data": lambda: with_chunk(corner(), chunk(b"eXIf", PLAIN_EXIF), is_behind=True),
    "png xmp": lambda: with_chunk(corner(), itxt(attribute(6))),
    "png xmp packed": lambda: with_chunk(corner(), itxt(element(6), is_packed=True)),
    "png xmp behind": lambda: with_chunk(corner(), itxt(attribute(6)), is_behind=True),
    "png raw profile exif": lambda: with_text(b"tEXt", b"exif\0" + raw_profile(b"exif", exif(6))),
    "png raw profile exif packed": lambda: with_text(
        b"zTXt",
        b"exif\0\0" + zlib.compress(raw_profile(b"exif", exif(6))),
    ),
    "png raw profile app1": lambda: with_text(
        b"zTXt",
        b"APP1\0\0" + zlib.compress(raw_profile(b"generic profile", exif(6))),
    ),
    "png raw profile app1 xmp": lambda: with_text(
        b"tEXt",
        b"APP1\0" + raw_profile(b"generic profile", XAP + attribute(6)),
    ),
    "png raw profile xmp": lambda: with_text(b"tEXt", b"xmp\0" + raw_profile(b"xmp", attribute(6))),
    "webp exif": lambda: corner("WEBP", lossless=True, exif=exif(6)),
    "webp xmp": lambda: corner("WEBP", lossless=True, xmp=element(6)),
    "avif": lambda: corner("AVIF", quality=95, exif=exif(6)),
    "tiff tag": lambda: corner("TIFF", tiffinfo={0x0112: 6}),
    "tiff packed": lambda: corner("TIFF", tiffinfo={0x0112: 6}, compression="tiff_lzw"),
    "tiff xmp": lambda: corner("TIFF", tiffinfo={700: attribute(6)}),
    "tiff xmp, packed": lambda: corner("TIFF", tiffinfo={700: other_prefix(6)}, compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_picture_is_turned_as_its_metadata_say(name: str) -> None:
    """By 90 degrees to the right: the lower left quarter, blue, comes to the upper left."""
    data = TURNED[name]()
    assert read_size(data, LIMIT, "") == (96, 64)
    pixels = decode(data, ImageSize(96, 64), "").astype(int)
    wanted = {(24, 16): (0, 0, 255), (24, 48): (255, 0, 0), (72, 48): (0, 128, 0), (72, 16): (255, 255, 255)}
    for place, colour in wanted.items():
        assert np.abs(pixels[place] - colour).max() < 12, (place, pixels[place])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["jpeg exif", "xmp", "tiff tag", "tiff xmp", "avif"])
def test_all_turns_are_those_of_exif(name: str, turn: int) -> None:
    from PIL import ImageOps

    data = {
        "jpeg exif": lambda: corner("JPEG", quality=95, exif=exif(turn)),
        "xmp": lambda: with_chunk(corner(), itxt(attribute(turn))),
        "tiff tag": lambda: corner("TIFF", tiffinfo={0x0112: turn}),
        "tiff xmp": lambda: corner("TIFF", tiffinfo={700: attribute(turn)}),
        "avif": lambda: corner("AVIF", quality=95, exif=exif(turn)),
    }[name]()
    size = read_size(data, LIMIT, "")
    image = Image.open(io.BytesIO(corner(exif=exif(turn))))
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    assert size == expected.shape[:2]
    difference = np.abs(decode(data, size, "").astype(int) - expected)
    assert np.median(difference) < 4
    assert difference.mean() < 6


BROKEN_METADATA = {
    "exif is noise": lambda: corner("JPEG", exif=b"Exif\0\0" + random.Random(0).randbytes(200)),
    "exif ends early": lambda: with_segment(corner("JPEG"), segment(0xE1, exif(6)[:20])),
    "orientation 0": lambda: with_chunk(corner(), chunk(b"eXIf", exif(0)[6:])),
    "orientation 9": lambda: with_chunk(corner(), chunk(b"eXIf", exif(9)[6:]), is_behind=True),
    "xmp without": lambda: with_chunk(corner(), itxt(b"<x:xmpmeta/>")),
    "no hex": lambda: with_chunk(corner(), chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz")),
    "no zlib": lambda: with_chunk(corner(), chunk(b"zTXt", b"Raw profile type exif\0\0nonsense")),
    "tiff orientation 9": lambda: corner("TIFF", tiffinfo={0x0112: 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_a_picture_with_broken_metadata_is_upright(name: str) -> None:
    data = BROKEN_METADATA[name]()
    assert read_size(data, LIMIT, "") == (64, 96)
    assert np.abs(decode(data, ImageSize(64, 96), "")[16, 24].astype(int) - (255, 0, 0)).max() < 12


# Files that are made up of too much.


def progressive(num_scans: int) -> bytes:
    """A small progressive JPEG whose last scan comes again and again."""
    data = encode(noise(1, (64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + data[-2:]


def gif(before: bytes) -> bytes:
    data = encode(scene(1).convert("P"), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + before + data[at:]


def tiff(num_tags: int, num_strips: int) -> bytes:
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (273, 4, num_strips, 8)]
    tags += [(40000 + number, 3, 1, 0) for number in range(num_tags - len(tags))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, num_tags) + entries + bytes(4)


def run_lengths(nbytes: int) -> bytes:
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 0, 0, 1078, 40, 8000, 8000, 1, 8, 1, nbytes, 0, 0, 256, 0)
    return head + bytes(1024) + b"\1\5" * (nbytes // 2)


def segments(one: bytes, size: int) -> bytes:
    return with_segment(corner("JPEG"), one * (size // len(one)))


def junk(size: int) -> bytes:
    one = b"\1" * 60_000 + b"\xff\xe0\0\2"
    return b"\xff\xd8\xff\xe0\0\2" + one * (size // len(one))


def webp(size: int) -> bytes:
    head = b"RIFF" + struct.pack("<I", size) + b"WEBPVP8X\x0a\0\0\0"
    return head + bytes(10) + b"ABCD\0\0\0\0" * (size // 8)


def avif(size: int) -> bytes:
    return struct.pack(">I", 16) + b"ftypavif" + bytes(4) + b"\0\0\0\x08free" * (size // 8)


PNG_HEAD = corner()[:33]
HOSTILE: dict[str, tuple[Callable[[int], bytes], str]] = {
    "scans": (lambda _: progressive(2000), "more than 64 scans"),
    "empty markers": (lambda size: b"\xff\xd8" + b"\xff\xd0" * (size // 2), "segments"),
    "empty segments": (lambda size: b"\xff\xd8" + b"\xff\xe0\0\2" * (size // 4), "segments"),
    "empty comments": (lambda size: segments(b"\xff\xfe\0\2", size), "segments"),
    "exif in pieces": (lambda size: segments(segment(0xE1, b"Exif\0\0" + bytes(99)), size), "EXIF"),
    "metadata": (lambda size: segments(segment(0xE2, bytes(65533)), size), "metadata"),
    "tables": (lambda size: segments(segment(0xDB, bytes(65520)), size), "tables"),
    "fill": (lambda size: b"\xff\xd8\xff" + b"\xff" * size, "not a picture"),
    "junk": (junk, "belong to nothing"),
    "an early end": (lambda size: b"\xff\xd8\xff\xd9" + b"\xff\xd0" * (size // 2), "not a picture"),
    "empty chunks": (lambda size: PNG_HEAD + chunk(b"tESt", b"") * (size // 12), "chunks"),
    "empty data": (lambda size: PNG_HEAD + chunk(b"IDAT", b"") * (size // 12), "chunks"),
    "webp chunks": (webp, "chunks"),
    "gif comments": (lambda size: gif(b"\x21\xfe" + b"\1x" * (size // 2)), "blocks"),
    "gif junk": (lambda size: gif(bytes(size)), "blocks"),
    "gif extensions": (lambda size: gif(b"\x21\xff\0" * (size // 3)), "blocks"),
    "tiff tags": (lambda _: tiff(5000, 1), "tags"),
    "tiff strips": (lambda _: tiff(3, 10**6), "strips"),
    "avif boxes": (avif, "boxes"),
    "bmp run lengths": (lambda _: run_lengths(24 * MIB), "run-length"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_made_up_of_too_much_is_refused_at_once(name: str) -> None:
    make, words = HOSTILE[name]
    data = make(50 * MIB)
    start = time.process_time()
    with pytest.raises(RequestError, match=words) as refusal:
        read_size(memoryview(data), LIMIT, "field")
    assert time.process_time() - start < 0.2
    assert (refusal.value.info.status, refusal.value.info.field) == (400, "field")
    with pytest.raises(RequestError, match=words):
        decode(data, SIDE, "")


def test_a_large_scan_costs_little_to_walk() -> None:
    data = corner("JPEG")
    body = data[:-2] + b"\xff\0" * (25 * MIB) + data[-2:]
    start = time.process_time()
    assert not walk(body, "").lacks_end
    assert time.process_time() - start < 1.5


def test_a_webp_with_a_huge_canvas_is_refused_before_it_is_allocated() -> None:
    head = b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xfe\x3f\0" * 2
    with pytest.raises(RequestError, match="16383 x 16383 pixels"):
        read_size(head + bytes(70), LIMIT, "")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "JPEG",
            {"progressive": True, "quality": 98, "icc_profile": bytes(400_000), "comment": b"c" * 60_000},
        ),
        ("PNG", {"exif": exif(1)}),
        ("WEBP", {"lossless": True}),
        ("GIF", {"comment": b"c" * 60_000}),
        ("BMP", {}),
        ("AVIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"big_tiff": True}),
    ],
    ids=str,
)
def test_large_pictures_as_programs_write_them_pass(kind: str, options: dict[str, object]) -> None:
    data = encode(noise(2, (1500, 900)), kind, **options)
    assert read_size(data, LIMIT, "") == (900, 1500)
    assert decode(data, SIDE, "").shape == (*SIDE, 3)


def test_an_animation_and_a_file_of_pages_show_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = scene(1), Image.new("RGB", (112, 112), "black")
    for kind, options in (
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100}),
    ):
        data = encode(first, kind, save_all=True, append_images=[second] * 3, **options)
        alone = decode(encode(first), ImageSize(112, 112), "").astype(int)
        assert np.abs(decode(data, ImageSize(112, 112), "") - alone).mean() < 3, kind
    monkeypatch.setattr(picture_files, "MAX_CHUNKS", 3)
    with pytest.raises(RequestError, match="more than 3 chunks"):
        read_size(encode(first, "WEBP", save_all=True, append_images=[second] * 3), LIMIT, "")


def test_text_that_inflates_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b" " * (64 * MIB), 9))
    start = time.process_time()
    assert walk(PNG_HEAD + bomb * 500, "").exif == (b"",) * picture_files.MAX_TEXTS
    assert time.process_time() - start < 0.5
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 1000, zip=True)
    assert walk(corner(pnginfo=info), "").exif == ()
