"""The kind of a video's packet, read from its codec's headers without decoding.

Containers mark key frames, but not whether decoding may start there: after an H.264 recovery point, say,
pictures may still refer to earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import NamedTuple

AV1_FRAME_HEADER, AV1_FRAME = 3, 6


class Kind(Enum):
    ENTRY = "decoding may start here: what is shown from this picture's time on depends on nothing before"
    PICTURE = "one picture is shown"
    DOUBTFUL = "damaged, or shows not exactly one picture"


Look = Callable[[memoryview], Kind]


class _Units(NamedTuple):
    """A codec's NAL units. The first bit behind a slice's header marks the first slice of a picture."""

    head_bytes: int
    type_shift: int  # of the type, in the header's first byte
    type_mask: int
    slices: range
    entries: frozenset[int]
    parameters: frozenset[int]
    breaks: frozenset[int]


# ITU-T H.264, 7.3.1 and 7.3.3: IDR pictures are entries. The first macroblock of the picture is 0, written as
# the bit 1.
H264 = _Units(1, 0, 31, range(1, 6), entries=frozenset({5}), parameters=frozenset({7, 8}), breaks=frozenset())
# ITU-T H.265, 7.3.1.2 and 7.3.6.1: IDR and CRA. Pictures later in time than a CRA refer to nothing before it.
# Decoders skip pictures behind broken links and ends of sequences.
HEVC = _Units(
    2, 1, 63, range(32), entries=frozenset({19, 20, 21}), parameters=frozenset({32, 33, 34}),
    breaks=frozenset({16, 17, 18, 36, 37})
)  # fmt: skip


def look_of(codec: str, extradata: bytes | None) -> Look | None:
    """Gives the kind of packets, as in mp4 and Matroska, of a codec; None for a codec that must be decoded.

    `codec` is FFmpeg's name of the decoder.
    """
    data = extradata or b""
    match codec:
        case "h264" if len(data) > 6 and data[0] == 1:
            return partial(_look_at_units, H264, (data[4] & 3) + 1)
        case "hevc" if len(data) > 22 and data[:3] != b"\0\0\0" and data[:3] != b"\0\0\1":
            return partial(_look_at_units, HEVC, (data[21] & 3) + 1)
        case "vp8":
            return _vp8
        case "vp9":
            return _vp9
        case "av1" | "libdav1d":
            return _av1
        case _:
            return None


def _units(data: memoryview, length_size: int) -> list[memoryview] | None:
    """The NAL units of a packet, each after its length; None when the lengths do not add up."""
    units, at = [], 0
    while at < len(data):
        start = at + length_size
        at = start + int.from_bytes(data[at:start], "big")
        if at <= start or at > len(data):
            return None
        units.append(data[start:at])
    return units


def _look_at_units(codec: _Units, length_size: int, data: memoryview) -> Kind:
    """The kind of a packet of NAL units: one picture, whose slices are all entries or none is."""
    units = _units(data, length_size)
    if units is None or any(unit[0] & 0x80 for unit in units):
        return Kind.DOUBTFUL
    types = [unit[0] >> codec.type_shift & codec.type_mask for unit in units]
    slices = [(kind, unit) for kind, unit in zip(types, units, strict=True) if kind in codec.slices]
    is_entry = all(kind in codec.entries for kind, _ in slices)
    head = codec.head_bytes
    if sum(unit[head] >> 7 for _, unit in slices if len(unit) > head) != 1 or not codec.breaks.isdisjoint(
        types
    ):
        return Kind.DOUBTFUL
    if not is_entry and not codec.parameters.isdisjoint(types):
        return Kind.DOUBTFUL
    return Kind.ENTRY if is_entry else Kind.PICTURE


def _vp8(data: memoryview) -> Kind:
    """RFC 6386, 9.1. A reference picture that is not shown has a packet of its own."""
    if len(data) < 3 or not data[0] & 0x10:
        return Kind.DOUBTFUL
    return Kind.PICTURE if data[0] & 1 else Kind.ENTRY


def _vp9(data: memoryview) -> Kind:
    """The VP9 bitstream specification, 6.2 and annex B: an index at the end has the sizes of pictures."""
    last = data[-1]
    if last & 0xE0 != 0xC0:
        return _vp9_kind([data])
    size_bytes, count = (last >> 3 & 3) + 1, (last & 7) + 1
    index_bytes = 2 + size_bytes * count
    if len(data) < index_bytes or data[-index_bytes] != last:
        return _vp9_kind([data])
    pictures, at = [], 0
    for number in range(count):
        start = len(data) - index_bytes + 1 + number * size_bytes
        end = at + int.from_bytes(data[start : start + size_bytes], "little")
        pictures.append(data[at:end])
        at = end
    return _vp9_kind(pictures)


def _vp9_kind(pictures: list[memoryview]) -> Kind:
    shown, is_entry = 0, False
    for number, picture in enumerate(pictures):
        # Profile 3 has a further bit in its header.
        if not len(picture) or picture[0] >> 6 != 2 or picture[0] & 0x30 == 0x30:
            return Kind.DOUBTFUL
        shows_known, is_inter, is_shown = picture[0] >> 3 & 1, picture[0] >> 2 & 1, picture[0] >> 1 & 1
        shown += shows_known or is_shown
        is_entry = is_entry or (number == 0 and not shows_known and not is_inter and bool(is_shown))
    if shown != 1:
        return Kind.DOUBTFUL
    return Kind.ENTRY if is_entry else Kind.PICTURE


def _av1(data: memoryview) -> Kind:
    """The AV1 bitstream specification, 5.3 and 5.9: one picture is shown; a shown key frame resets all."""
    at = 0
    while at < len(data):
        kind, has_extension, has_size = data[at] >> 3 & 15, data[at] >> 2 & 1, data[at] >> 1 & 1
        at += 1 + has_extension
        length, at = _leb128(data, at) if has_size else (len(data) - at, at)
        if length < 0 or at + length > len(data):
            return Kind.DOUBTFUL
        if kind in (AV1_FRAME_HEADER, AV1_FRAME) and length:
            # show_existing_frame (1 bit) = 0, frame_type (2 bits) = 0, show_frame (1 bit) = 1
            return Kind.ENTRY if data[at] >> 4 == 1 else Kind.PICTURE
        at += length
    return Kind.DOUBTFUL


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    """A number and its end; -1 when the data is too short."""
    value = 0
    for number in range(8):
        if at >= len(data):
            break
        value |= (data[at] & 127) << 7 * number
        at += 1
        if not data[at - 1] & 128:
            return value, at
    return -1, at
