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
    return tuple(_move_message(message, frames, f"messages[{at}]") for at, message in enumerate(messages))


def move_media_urls(
    media: Sequence[ImagePart | VideoPart], frames: list[bytes | memoryview]
) -> tuple[ImagePart | VideoPart, ...]:
    """The same for the media of a prompt of tokens."""
    moved = (_move_part(part, frames, f"media[{at}]") for at, part in enumerate(media))
    return tuple(part for part in moved if not isinstance(part, TextPart))


def _move_message(message: ChatMessage, frames: list[bytes | memoryview], field: str) -> ChatMessage:
    if isinstance(message.content, str):
        return message
    parts = (_move_part(part, frames, f"{field}.content[{at}]") for at, part in enumerate(message.content))
    return msgspec.structs.replace(message, content=tuple(parts))


def _move_part(part: Part, frames: list[bytes | memoryview], field: str) -> Part:
    if isinstance(part, TextPart):
        return part
    if isinstance(part, ImagePart):
        return _move_data_url(part, frames, f"{field}.image_url")
    if part.frames:
        place = f"{field}.video_url"
        moved = (_move_data_url(frame, frames, f"{place}[{at}]") for at, frame in enumerate(part.frames))
        return msgspec.structs.replace(part, frames=tuple(moved))
    if pictures := _pictures(part.url, f"{field}.video_url"):
        if part.uuid:
            raise RequestError("a list of frames has no uuid", field=f"{field}.uuid")
        first = len(frames)
        frames.extend(pictures)
        numbers = range(first, len(frames))
        moved = (ImagePart(frame=number, is_base64=True) for number in numbers)
        return msgspec.structs.replace(part, url="", frames=tuple(moved))
    return _move_data_url(part, frames, f"{field}.video_url")


def _move_data_url(part: M, frames: list[bytes | memoryview], field: str) -> M:
    if not _is_data_url(part.url):
        return part
    _, is_base64, payload = _split(part.url, field)
    data = _encoded(payload, field)
    frames.append(data if is_base64 else percent_decoded(data))
    return msgspec.structs.replace(part, url="", frame=len(frames) - 1, is_base64=is_base64)


def _pictures(url: str, field: str) -> list[bytes]:
    """The frames of a video written as `data:video/jpeg;base64,A,B,C`, as vLLM's clients do; else none."""
    if not _is_data_url(url):
        return []
    kind, is_base64, payload = _split(url, field)
    if not is_base64 or not PICTURES.fullmatch(kind):
        return []
    data = _encoded(payload, field)
    if b"%" in data:
        data = percent_decoded(data)  # the commas may be encoded, too
    if (count := data.count(b",") + 1) > MAX_ITEMS:
        raise RequestError(f"the video has {count} frames, the limit is {MAX_ITEMS}", field=field)
    if count == 1 and ANIMATIONS.fullmatch(kind):
        return []
    pictures = data.split(b",")
    if not all(picture.strip(BLANKS) for picture in pictures):
        raise RequestError("a frame of the video is empty: single commas separate frames", field=field)
    return pictures


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
