"""Requests with something wrong: valid ones to every route, changed in their media, structure, text, path and
head.

A seed and a number make one request, whoever sends it and when. No URL in them leads off the loopback
address.

    media bytes -> body -> structure -> text -> path -> head
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from tools.valid_requests import CHAT, INQUIRIES, Media, RequestMaker

Json = dict[str, Any]
# Written as they are in place of a string "@raw:NUMBER@": values that no Python value becomes.
ODD_JSON = (
    "NaN",
    "-Infinity",
    "1e400",
    "9" * 400,
    "-0",
    '"\\ud83d"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    "[" * 900 + "]" * 900,
    '{"a":' * 900 + "1" + "}" * 900,
    "[" * 100_000,
    "",
    "nul",
    "0x10",
    "'a'",
    "[,]",
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, "", "\ud800", "\x00", [], {}, [[]], [None], {"": {}}, -1, 0, 1, 0.5, 2**31, 2**63,
    2**64, -(2**70), 1e308, -0.0, 10**40,
    "auto", "a" * 5000, "é\u202e" * 300, "data:", "data:,x", "data:image/png;base64,",
    "data:image/png;base64,%%%", "http://127.0.0.1:9/",
    "file:///etc/passwd", "/9j/4AAQ", ["stop"] * 100, {"type": "text"}, {"url": None},
    {"type": "json_object"},
    *(f"@raw:{number}@" for number in range(len(ODD_JSON))),
)  # fmt: skip
MORE_KEYS = (
    "nframes", "fps", "tools", "n", "seed", "max_pixels", "min_pixels", "resized_height", "stop",
    "logit_bias", "tool_choice", "x", "\ud800", "uuid",
    "video_start", "video_end", "total_pixels", "detail", "image", "video", "text", "temperature", "stream",
    "min_tokens", "priority", "name", "",
)  # fmt: skip
JUNK = (
    b"",
    b'"',
    b"[",
    b"}",
    b"\\",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xff",
    b"\x00",
    b"9" * 30,
    b"NaN",
    b"\xef\xbb\xbf",
)
CONTENT_TYPES = (
    "",
    "text/plain",
    "application/json; charset=utf-16",
    "multipart/form-data; boundary=x",
    "application/octet-stream",
    ";;=",
    "é",
)
ENCODINGS = ("gzip", "deflate", "br", "identity", "x, gzip", ",")


METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW", "post", "CONNECT")
PLACES = (
    "/v1/models/", "/v1/responses/", "/v1/responses/resp_0/", "/v1/chat/", "/v1/", "/admin/", "/",
)  # fmt: skip
ODD_PATHS = (
    "x", "%", "%00", "%2e%2e/%2e%2e/etc/passwd", "..", "../..", "//", "a" * 5000, "%ff%fe", "%E2%80%AE", "?",
    "#", "{name}", ";", "&=&", "%0d%0aX:%20y", "resp_" + "0" * 32, "input_items", "\\", "é", "[",
    "%F0%9F%98%80" * 50,
)  # fmt: skip
# These may make a request that is no HTTP.
HEAD_CHANGES = {"content type", "encoding", "length", "chunks", "header", "path", "method"}


class Mutated(NamedTuple):
    request: bytes  # head and body, as they go over the wire
    is_framed: bool  # the head tells where the body ends: an answer is due
    what: tuple[str, ...]  # has been changed; nothing: it must be served
    path: str = CHAT  # of the route; empty: not one that there is for sure


def make_media() -> Media:
    """Small files of each kind that is served. Always the same."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    smooth = frames[0].resize((6, 6)).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    return {
        "image/png": [
            _file(smooth, "PNG"),
            _file(frames[1].convert("RGBA"), "PNG"),
            _file(smooth.convert("P"), "PNG"),
        ],
        "image/jpeg": [
            _file(smooth, "JPEG", exif=exif),
            _file(frames[2], "JPEG", progressive=True),
            _file(smooth.convert("L"), "JPEG"),
        ],
        "image/gif": [_file(smooth, "GIF", save_all=True, append_images=frames[:2])],
        "image/webp": [_file(smooth, "WEBP"), _file(frames[3], "WEBP", lossless=True)],
        "image/bmp": [_file(smooth, "BMP")],
        "video/mp4": [_clip(frames)],
    }


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _clip(frames: Sequence[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def mutated_request(seed: int, number: int, media: Media, key: str = "") -> Mutated:
    rng, what = random.Random(f"{seed}:{number}"), list[str]()
    path, body = _maker(rng, media, what).request()
    data = None if body is None else _mutated(body, rng, what)
    shown, method = _changed_path(path, rng, what), "GET" if data is None else "POST"
    if rng.random() < 0.02:
        what.append("method")
        method = rng.choice(METHODS)
    return _with_head(f"{method} {shown}", path if shown == path else "", data or b"", rng, what, key)


def mutated_body(rng: random.Random, media: Media, what: list[str]) -> bytes:
    """Of a chat. The changes are added to `what`."""
    return _mutated(_maker(rng, media, what).chat_body(), rng, what)


def _maker(rng: random.Random, media: Media, what: list[str]) -> RequestMaker:
    damage = rng.choice((0.0, 0.0, 0.7))

    def damaged(data: bytes) -> bytes:
        if rng.random() >= damage:
            return data
        what.append("media bytes")
        return _damaged(data, rng)

    return RequestMaker(rng, media, damaged)


def _mutated(body: Json, rng: random.Random, what: list[str]) -> bytes:
    body = _copy(body)  # parts of it are others' too
    what += [_change_structure(body, rng) for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3)))]
    data = _written(body)
    return _change_text(data, rng, what) if rng.random() < 0.1 else data


def _changed_path(path: str, rng: random.Random, what: list[str]) -> str:
    """Often those of GET: there is nothing else to change in them."""
    if rng.random() > (0.5 if path in INQUIRIES else 0.02):
        return path
    what.append("path")
    odd = rng.choice(ODD_PATHS)
    match rng.randrange(4):
        case 0:
            return rng.choice(PLACES) + odd
        case 1:
            return f"{path}?{odd}={odd}"
        case 2:
            place = rng.randrange(1, len(path) + 1)
            return path[:place] + odd + path[place:]
        case _:
            return rng.choice((path.upper(), path + "/", "/" + path, path.removeprefix("/v1"), path[1:], "*"))


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """A file with some of its bytes changed, lost, doubled or added."""
    place = rng.randrange(len(data))
    end = min(len(data), place + rng.choice((1, 4, 30, 300)))
    match rng.randrange(7):
        case 0 | 1:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 4, 40))):
                changed[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(changed)
        case 2:  # sizes and counts stand in the first bytes
            place = rng.randrange(min(len(data), 64))
            return data[:place] + rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4))) + data[place + 4 :]
        case 3:
            return data[:place]
        case 4:
            return data[:place] + data[end:]
        case 5:
            return data[:end] + data[place:end] * rng.choice((1, 50)) + data[end:]
        case _:
            return data[:place] + rng.randbytes(end - place) + data[place:]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every place in a body: its container and its key there."""
    pairs: list[tuple[Any, Any]] = (
        list(node.items() if isinstance(node, dict) else enumerate(node))
        if isinstance(node, dict | list)
        else []
    )
    return [(node, key) for key, _ in pairs] + [place for _, child in pairs for place in _places(child)]


def _change_structure(body: Json, rng: random.Random) -> str:
    """Changes one place somewhere inside; says how."""
    places = _places(body)
    if not places:
        return "nothing left"
    node, key = rng.choice(places)
    value, odd = node[key], _copy(rng.choice(ODD_VALUES))
    match rng.randrange(9):
        case 0:
            del node[key]
            return "drop"
        case 1 if isinstance(node, list):
            node += [_copy(value) for _ in range(rng.choice((1, 3, 60)))]
            return "repeat"
        case 1:
            node[f"@again:{key}@"] = rng.choice((_copy(value), odd))
            return "key twice"
        case 2 if isinstance(node, dict):
            node[rng.choice(MORE_KEYS)] = odd
            return "more keys"
        case 3 if isinstance(node, dict):
            node[rng.choice(MORE_KEYS)] = node.pop(key)
            return "rename"
        case 4:
            node[key] = rng.choice(([value], {"a": value}, str(value)[:9999], [value, odd]))
            return "wrap"
        case 5:
            other, place = rng.choice(places)
            node[key] = _copy(other[place])
            return "exchange"
        case 6 if isinstance(value, str):
            node[key] = _damaged_string(value, rng)
            return "string"
        case _:
            node[key] = odd
            return "retype"


def _copy(value: Any) -> Any:
    match value:
        case dict():
            return {key: _copy(child) for key, child in value.items()}
        case list():
            return [_copy(child) for child in value]
        case _:
            return value


def _damaged_string(value: str, rng: random.Random) -> str:
    place = rng.randrange(len(value) + 1)
    match rng.randrange(5):
        case 0:
            return value[:place]
        case 1:
            return (
                value[:place]
                + rng.choice(
                    ("%", "\ud800", "=", "\n", ",", "<|im_end|>", "<|image_pad|>", "é", "\x00", ";base64,")
                )
                + value[place:]
            )
        case 2:
            return value[:place] + value[place + 1 :]
        case 3:
            return value.swapcase()
        case _:
            return value * rng.choice((2, 200)) if len(value) < 1000 else value + value


def _written(body: Json) -> bytes:
    written = json.dumps(body)
    written = re.sub(r'"@again:([^"@]*)@"', r'"\1"', written)
    return re.sub(r'"@raw:(\d+)@"', lambda found: ODD_JSON[int(found[1])], written).encode()


def _change_text(data: bytes, rng: random.Random, what: list[str]) -> bytes:
    place = rng.randrange(len(data))
    match rng.randrange(8):
        case 0 | 1:
            what.append("bytes")
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(data) + 1)
                data = (
                    data[:place] + rng.choice((*JUNK, rng.randbytes(2))) + data[place + rng.randint(0, 3) :]
                )
            return data
        case 2 | 3:
            what.append("cut")
            return data[:place]
        case 4:
            what.append("character set")
            return data.decode().encode(rng.choice(("utf-16", "utf-32-be", "utf-8-sig", "cp500")))
        case 5:
            what.append("more text")
            return data + rng.choice((data, b"]", b"\x00", b" " * 100_000))
        case 6:
            what.append("no object")
            return rng.choice(
                (
                    b"[" + data + b"]",
                    json.dumps(data.decode()).encode(),
                    b"null",
                    b"7",
                    b'""',
                    b"[]",
                    b"[[]]",
                    b"{}",
                    b" ",
                )
            )
        case _:
            what.append("compressed")
            return gzip.compress(data, mtime=0)


def _wrong_length(right: int, rng: random.Random) -> str:
    near = (right + rng.randint(1, 5), right - rng.randint(1, 30))
    return str(rng.choice((*near, 0, -1, 2**31, 2**64, "9" * 300, "+1", "1e3", "0x1", "", "1, 1")))


def _chunked(data: bytes) -> bytes:
    pieces = [piece for piece in (data[:1000], data[1000:]) if piece]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _broken_chunks(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    wrong = rng.choice((b"", b"\r\n", b"0\r\n\r\n", b"g", b"-1", b"\x00"))
    return data[:place] + wrong + data[place + 1 :]


def _with_head(line: str, path: str, data: bytes, rng: random.Random, what: list[str], key: str) -> Mutated:
    headers = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data))}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    is_framed = True
    match rng.randrange(60):
        case 0:
            what.append("content type")
            headers["Content-Type"] = rng.choice(CONTENT_TYPES)
        case 1:
            what.append("encoding")
            headers["Content-Encoding"] = rng.choice(ENCODINGS)
            if rng.random() < 0.5:
                data = zlib.compress(data)
                headers["Content-Length"] = str(len(data))
        case 2:
            what.append("length")
            is_framed = False
            headers["Content-Length"] = _wrong_length(len(data), rng)
        case 3:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            data = _chunked(data)
            if rng.random() < 0.5:
                what.append("chunks")
                is_framed = False
                data = _broken_chunks(data, rng)
        case 4:
            headers["Expect"] = "100-continue"
        case 5:
            what.append("header")
            headers[rng.choice(("Connection", "Expect", "Transfer-Encoding", "X", "X-Forwarded-For"))] = (
                rng.choice(("", "x", "é", "close, y", "a" * 5000))
            )
            is_framed = "Transfer-Encoding" not in headers
        case _:
            pass
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return Mutated("\r\n".join([*lines, "", ""]).encode() + data, is_framed, tuple(what), path)
