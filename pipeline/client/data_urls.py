"""Moves `data:` URLs of a chat into frames of their own, so that large media are not copied as text.

Base64 stays encoded: the reader of the frame decodes it, with `forgiving_base64`, in a thread.
"""

from __future__ import annotations

import binascii
import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec
import numpy as np
import pybase64

from pipeline.wire.errors import RequestError
from pipeline.wire.limits import MAX_ITEMS
from pipeline.wire.prompts import ChatMessage, ImagePart, Part, TextPart, VideoPart

M = TypeVar("M", ImagePart, VideoPart)
MAX_HEADER = 1024  # characters of a media type with its parameters
MAX_PERCENT_BYTES = 2 << 20  # of a request's data that is not base64: 32 ms of the event loop (AVX2)
UNQUOTE_BYTES = 1 << 20  # decoded at once: decoding needs several arrays of that size
BLANKS = b"\t\n\f\r "
TO_STANDARD = bytes.maketrans(b"-_", b"+/")
HEX = np.full(256, -1, np.int16)
HEX[list(b"0123456789abcdefABCDEF")] = [*range(16), *range(10, 16)]
PICTURES = re.compile(r"(?:video|image)/(?:x-)?(?:jpe?g|png|webp|bmp|gif)")
# A single picture of these types may be an animation, and so a video by itself.
ANIMATIONS = re.compile(r"(?:video|image)/gif|image/(?:png|webp)")


def move_data_urls(
    messages: Sequence[ChatMessage], frames: list[bytes | memoryview]
) -> tuple[ChatMessage, ...]:
    """The messages without the data of their `data:` URLs, which is appended to `frames`.

    Raises RequestError for an invalid URL.
    """
    mover = _Mover(frames)
    return tuple(mover.message(message, f"messages[{at}]") for at, message in enumerate(messages))


def move_media_urls(
    media: Sequence[ImagePart | VideoPart], frames: list[bytes | memoryview]
) -> tuple[ImagePart | VideoPart, ...]:
    """The same for the media of a prompt of tokens."""
    mover = _Mover(frames)
    moved = (mover.part(part, f"media[{at}]") for at, part in enumerate(media))
    return tuple(part for part in moved if not isinstance(part, TextPart))


class _Mover:
    """Of one request."""

    def __init__(self, frames: list[bytes | memoryview]) -> None:
        self._frames = frames
        self._num_percent_bytes = 0

    def message(self, message: ChatMessage, field: str) -> ChatMessage:
        if isinstance(message.content, str):
            return message
        parts = (self.part(part, f"{field}.content[{at}]") for at, part in enumerate(message.content))
        return msgspec.structs.replace(message, content=tuple(parts))

    def part(self, part: Part, field: str) -> Part:
        if isinstance(part, TextPart):
            return part
        if isinstance(part, ImagePart):
            return self._url(part, f"{field}.image_url")
        if part.frames:
            place = f"{field}.video_url"
            moved = (self._url(frame, f"{place}[{at}]") for at, frame in enumerate(part.frames))
            return msgspec.structs.replace(part, frames=tuple(moved))
        if pictures := _pictures(part.url, f"{field}.video_url"):
            if part.uuid:
                raise RequestError("a list of frames has no uuid", field=f"{field}.uuid")
            first = len(self._frames)
            self._frames.extend(pictures)
            numbers = range(first, len(self._frames))
            moved = (ImagePart(frame=number, is_base64=True) for number in numbers)
            return msgspec.structs.replace(part, url="", frames=tuple(moved))
        return self._url(part, f"{field}.video_url")

    def _url(self, part: M, field: str) -> M:
        if not _is_data_url(part.url):
            return part
        _, is_base64, payload = _split(part.url, field)
        data = _encoded(payload, field)
        self._frames.append(data if is_base64 else self._percent_decoded(data, field))
        return msgspec.structs.replace(part, url="", frame=len(self._frames) - 1, is_base64=is_base64)

    def _percent_decoded(self, data: bytes, field: str) -> bytes:
        """Data that is not base64 is decoded here and now, so there may be only a little of it."""
        if b"%" not in data:
            return data
        self._num_percent_bytes += len(data)
        if self._num_percent_bytes > MAX_PERCENT_BYTES:
            limit = f"a request may have {MAX_PERCENT_BYTES} bytes of percent-encoded data"
            raise RequestError(f"{limit}, and this makes {self._num_percent_bytes}: send base64", field=field)
        return percent_decoded(data)


def _pictures(url: str, field: str) -> list[bytes]:
    """The frames of a video written as `data:video/jpeg;base64,A,B,C`, as vLLM's clients do; else none."""
    if not _is_data_url(url):
        return []
    kind, is_base64, payload = _split(url, field)
    if not is_base64 or not PICTURES.fullmatch(kind):
        return []
    data = _encoded(payload, field)
    escaped = _escaped_commas(data) if b"%" in data else []
    if (count := data.count(b",") + len(escaped) + 1) > MAX_ITEMS:
        raise RequestError(f"the video has {count} frames or more, the limit is {MAX_ITEMS}", field=field)
    if count == 1 and ANIMATIONS.fullmatch(kind):
        return []
    starts, ends = [0, *(at + len("%2C") for at in escaped)], [*escaped, len(data)]
    pieces = (data[start:end] for start, end in zip(starts, ends, strict=True))
    pictures = [picture for piece in pieces for picture in piece.split(b",")]
    if not all(picture.strip(BLANKS) for picture in pictures):
        raise RequestError("a frame of the video is empty: single commas separate frames", field=field)
    return pictures


def _escaped_commas(data: bytes) -> list[int]:
    """Where %2C is, or the first of too many. Other escapes stay: who reads the frames decodes them, in
    threads."""
    values, found = np.frombuffer(data, np.uint8), list[int]()
    for start in range(0, len(data), UNQUOTE_BYTES):
        piece = values[start : start + UNQUOTE_BYTES + 2]
        is_comma = (piece[:-2] == ord("%")) & (piece[1:-1] == ord("2")) & (piece[2:] | 0x20 == ord("c"))
        found += (start + np.flatnonzero(is_comma)).tolist()
        if len(found) > MAX_ITEMS:
            break
    return found


def _is_data_url(url: str) -> bool:
    return url[:64].lstrip("\t\n\r ")[:5].lower() == "data:"


def _split(url: str, field: str) -> tuple[str, bool, str]:
    """Media type in lower case, whether the data is base64, and the data."""
    comma = url.find(",", 0, MAX_HEADER)
    if comma < 0:
        what = "a data: URL has a comma before its data, as in data:image/png;base64,iVBORw…"
        raise RequestError(what, field=field)
    kind, *parameters = (word.strip() for word in url[:comma].lower().partition("data:")[2].split(";"))
    return kind, "base64" in parameters, url[comma + 1 :]


def _encoded(payload: str, field: str) -> bytes:
    try:
        return payload.encode()
    except UnicodeEncodeError:
        raise RequestError("the URL is not valid Unicode", field=field) from None


def percent_decoded(data: bytes) -> bytes:
    """Replaces each %XX by its byte; any other % stays (the URL standard's percent-decode).

    Takes time and memory linear in the data, however much of it is encoded.
    """
    return data if b"%" not in data else b"".join(map(_decode_piece, _pieces(data)))


def _pieces(data: bytes) -> Iterator[bytes]:
    """Pieces of bounded size; no piece ends within an escape."""
    start = 0
    while start < len(data):
        end = start + UNQUOTE_BYTES
        last = data.rfind(b"%", end - 2, end) if end < len(data) else -1
        end = last if last >= 0 else end
        yield data[start:end]
        start = end


def _decode_piece(piece: bytes) -> bytes:
    values = np.frombuffer(piece, np.uint8)
    at = np.flatnonzero(values[:-2] == ord("%"))
    high, low = HEX[values[at + 1]], HEX[values[at + 2]]
    is_escape = (high >= 0) & (low >= 0)
    at = at[is_escape]
    decoded, is_kept = values.copy(), np.ones(len(values), bool)
    decoded[at] = (high * 16 + low)[is_escape]
    is_kept[at + 1] = is_kept[at + 2] = False
    return decoded[is_kept].tobytes()


def forgiving_base64(data: bytes) -> bytes:
    """Base64 as browsers take it: blanks anywhere, %XX, no padding (the infra standard's forgiving-base64
    decode).

    Letters of URL-safe base64 are accepted, too. Raises ValueError for invalid base64.
    """
    with contextlib.suppress(binascii.Error):
        return pybase64.b64decode(data, validate=True)  # almost all clients send this, and it needs no copy
    plain = percent_decoded(data).translate(TO_STANDARD, BLANKS)
    if missing := -len(plain) % 4:
        plain += b"=" * missing
    return pybase64.b64decode(plain, validate=True)
