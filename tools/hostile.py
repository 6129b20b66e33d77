"""What strangers send: small files, bodies and messages that cost whoever reads them far more than whoever
sends them.

All of it is made here and seeded; nothing is larger than a request may be.
"""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from typing import Any

from PIL import Image


def jpeg_of_scans(side: int, num_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each is decoded into the whole picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(buffer, "JPEG", progressive=True, quality=10)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * num_scans + b"\xff\xd9"


def jpeg_of_segments(num_bytes: int) -> bytes:
    """A JPEG before whose data stand as many small EXIF segments as fit."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    segment = b"\xff\xe1\x00\x16Exif\x00\x00MM\x00*\x00\x00\x00\x08" + bytes(6)
    return b"\xff\xd8" + segment * (num_bytes // len(segment)) + buffer.getvalue()[2:]


def png_of_chunks(num_bytes: int) -> bytes:
    """A PNG that consists of empty chunks which nobody needs."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = struct.pack(">I", 0) + b"teST" + struct.pack(">I", zlib.crc32(b"teST"))
    return data[:33] + chunk * (num_bytes // len(chunk)) + data[33:]


def large_png(side: int) -> bytes:
    """A picture within the limits that is small to send and long to decode."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    deflater = zlib.compressobj(1)
    row = b"\x04" + b"\x01\x02\x03" * side  # Paeth's filter, the slowest
    body = b"".join(deflater.compress(row) for _ in range(side)) + deflater.flush()
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def rle_bitmap(side: int) -> bytes:
    """A run-length coded bitmap of runs of one pixel: Pillow reads it byte by byte."""
    body = (b"\x01\x05" * side + b"\x00\x00") * side + b"\x00\x01"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 2835, 2835, 256, 0)
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    offset = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + palette + body


def inflating(num_bytes: int) -> bytes:
    """A gzip file of so many blanks, a thousandth as long."""
    deflater = zlib.compressobj(9, wbits=31)
    parts = [deflater.compress(b" " * (1 << 20)) for _ in range(num_bytes >> 20)]
    return b"".join(parts) + deflater.flush()


def nested_messages(rng: random.Random, count: int) -> list[bytes]:
    """MessagePack deeper than a decoder's stack, and random bytes."""
    deep = (b"\x81\xa1a", b"\x91", b"\x81\xa4type", b"\x82\xa4type\xa5Hello\xa1b")
    return [
        rng.randbytes(rng.randint(0, 300))
        if number % 4 == 3
        else deep[number % 3] * rng.randint(500, 4000) + b"\xc0"
        for number in range(count)
    ]


def png(rng: random.Random, side: int = 56) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(buffer, "PNG")
    return buffer.getvalue()


def picture_part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"},
    }


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": list(parts)}],
        "max_tokens": 1,
        "temperature": 0,
        **fields,
    }


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}
