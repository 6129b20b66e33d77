"""What a packet of a video says about itself, read from its first bytes: without decoding.

Containers mark key frames, but not whether decoding may start there. After an H.264 recovery point, say,
pictures may still refer to those before it. The codec's own headers tell.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

H264_SLICE, H264_IDR, H264_PARAMETERS = 1, 5, (7, 8)
HEVC_IDR, HEVC_CRA, HEVC_PARAMETERS = (19, 20), 21, (32, 33, 34)
HEVC_LAST_SLICE = 31
HEVC_BREAKS = (16, 17, 18, 36, 37)  # broken links and ends of sequences: pictures behind them are skipped
AV1_FRAME_HEADER, AV1_FRAME = 3, 6


class Kind(Enum):
    ENTRY = "decoding may start here: what is shown from this picture's time on depends on nothing before"
    PICTURE = "one picture is shown"
    DOUBTFUL = "damaged, or shows not exactly one picture"


Look = Callable[[memoryview], Kind]


def look_of(codec: str, extradata: bytes | None) -> Look | None:
    """How to look at packets of a codec as mp4 and Matroska have them; None where only decoding tells.

    `codec` is FFmpeg's name of the decoder.
    """
    data = extradata or b""
    match codec:
        case "h264" if len(data) > 6 and data[0] == 1:
            return _h264((data[4] & 3) + 1)
        case "hevc" if len(data) > 22 and data[:3] != b"\0\0\0" and data[:3] != b"\0\0\1":
            return _hevc((data[21] & 3) + 1)
        case "vp8":
            return _vp8
        case "vp9":
            return _vp9
        case "av1" | "libdav1d":
            return _av1
        case _:
            return None


def _units(data: memoryview, length_size: int) -> list[memoryview] | None:
    """The NAL units of a packet, each behind its length; None when the lengths do not add up."""
    units, at = [], 0
    while at < len(data):
        start = at + length_size
        at = start + int.from_bytes(data[at:start], "big")
        if at <= start or at > len(data):
            return None
        units.append(data[start:at])
    return units


def _h264(length_size: int) -> Look:
    """ITU-T H.264, 7.3.1 and 7.3.3: a slice whose first macroblock is 0 begins a picture."""

    def look(data: memoryview) -> Kind:
        units = _units(data, length_size)
        if units is None or any(unit[0] & 0x80 for unit in units):
            return Kind.DOUBTFUL
        types = [unit[0] & 31 for unit in units]
        slices = [unit for unit in units if H264_SLICE <= unit[0] & 31 <= H264_IDR]
        is_entry = all(unit[0] & 31 == H264_IDR for unit in slices)
        if sum(unit[1] >> 7 for unit in slices if len(unit) > 1) != 1:
            return Kind.DOUBTFUL
        if not is_entry and set(types) & set(H264_PARAMETERS):
            return Kind.DOUBTFUL
        return Kind.ENTRY if is_entry else Kind.PICTURE

    return look


def _hevc(length_size: int) -> Look:
    """ITU-T H.265, 7.3.1.2 and 7.3.6.1. Pictures later in time than a CRA depend on nothing before it."""

    def look(data: memoryview) -> Kind:
        units = _units(data, length_size)
        if units is None or any(unit[0] & 0x80 for unit in units):
            return Kind.DOUBTFUL
        types = [unit[0] >> 1 & 63 for unit in units]
        slices = [unit for unit in units if unit[0] >> 1 & 63 <= HEVC_LAST_SLICE]
        is_entry = all(unit[0] >> 1 & 63 in (*HEVC_IDR, HEVC_CRA) for unit in slices)
        if sum(unit[2] >> 7 for unit in slices if len(unit) > 2) != 1 or set(types) & set(HEVC_BREAKS):
            return Kind.DOUBTFUL
        if not is_entry and set(types) & set(HEVC_PARAMETERS):
            return Kind.DOUBTFUL
        return Kind.ENTRY if is_entry else Kind.PICTURE

    return look


def _vp8(data: memoryview) -> Kind:
    """RFC 6386, 9.1. A picture that only others refer to has a packet of its own and is not shown."""
    if len(data) < 3 or not data[0] & 0x10:
        return Kind.DOUBTFUL
    return Kind.PICTURE if data[0] & 1 else Kind.ENTRY


def _vp9(data: memoryview) -> Kind:
    """The VP9 bitstream specification, 6.2 and annex B: an index at the end tells the sizes of several."""
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
    """A number and where it ends; -1 when the data ends before."""
    value = 0
    for number in range(8):
        if at >= len(data):
            break
        value |= (data[at] & 127) << 7 * number
        at += 1
        if not data[at - 1] & 128:
            return value, at
    return -1, at
