"""What strangers send: small files, bodies and messages that cost whoever reads them far more than whoever sends them.

All of it is made here and seeded; nothing is larger than a request may be.
"""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
import random
import struct
import zlib
from typing import Any

from PIL import Image

ODD_VALUES: tuple[Any, ...] = (
    None, True, "", "\ud800", "\x00", [], {}, [[]], -1, 0, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, -0.0, 10**40, "auto", "a" * 5000,
    "data:", "data:image/png;base64,", "http://127.0.0.1:9/", "file:///etc/passwd", "/9j/4AAQ", ["stop"] * 100, {"type": "text"},
)  # fmt: skip
ODD_JSON = ("NaN", "Infinity", "1e400", "9" * 400, '"\\ud83d"', "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900)
UNKNOWN_KEYS = ("nframes", "fps", "tools", "n", "seed", "max_pixels", "resized_height", "stop", "logit_bias", "tool_choice", "x")


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
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
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
    return [rng.randbytes(rng.randint(0, 300)) if number % 4 == 3 else deep[number % 3] * rng.randint(500, 4000) + b"\xc0" for number in range(count)]


def png(rng: random.Random, side: int = 56) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(buffer, "PNG")
    return buffer.getvalue()


def picture_part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1, "temperature": 0, **fields}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _bases(rng: random.Random) -> list[dict[str, Any]]:
    picture = picture_part(png(rng))
    frames = {"type": "video_url", "video_url": {"url": [picture["image_url"]["url"]] * 3}, "max_frames": 4}
    return [
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
        chat(picture, text("What is it?"), seed=3, top_p=0.5, stop=["a"]),
        chat(frames, text("What moves?"), logprobs=True, top_logprobs=2),
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [text("Hi")]}],
         "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"5": 1}, "n": 2},
    ]  # fmt: skip


def mutated_body(rng: random.Random) -> bytes:
    """A body as a client might send it, with one to three things wrong."""
    body = copy.deepcopy(rng.choice(_bases(rng)))
    for _ in range(rng.randint(1, 3)):
        _mutate(body, rng)
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    match rng.randrange(12):
        case 0:
            place = rng.randrange(len(data))
            return data[:place] + rng.randbytes(rng.randint(1, 4)) + data[place + rng.randint(0, 4) :]
        case 1:
            return data[: rng.randrange(len(data))]
        case 2:
            return gzip.compress(data, mtime=0)
        case 3 if b": 1" in data:
            return data.replace(b": 1", b": " + rng.choice(ODD_JSON).encode(), 1)
        case _:
            return data


def _mutate(node: Any, rng: random.Random) -> None:
    """Changes one place somewhere inside `node`."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.75:
            node = node[key]
            continue
        break
    match rng.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(UNKNOWN_KEYS)] = copy.deepcopy(rng.choice(ODD_VALUES))
        case 2 if isinstance(node, list):
            node += [node[key]] * rng.choice((1, 3, 60))
        case _:
            node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
