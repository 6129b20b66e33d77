"""All containers of videos that are read. A file's first bytes tell which one it is: FFmpeg is told, and
never guesses.

FFmpeg also knows lists of other files (HLS, DASH, concat, SDP) and would open what these name.
Only containers that hold all that they show are listed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

HEAD_BYTES = 8192  # of a file, that tell which container it is
SYNC = 0x47  # begins each packet of a transport stream
SYNC_PACKETS = 5  # so many in a row are no accident
# Plain; with a camcorder's time code before each packet (.MTS, .m2ts); with a broadcast's check sum behind.
TS_PACKET_SIZES = (188, 192, 204)
_BOXES = (
    b"ftyp",
    b"styp",
    b"moov",
    b"moof",
    b"mdat",
    b"sidx",
    b"emsg",
    b"prft",
    b"wide",
    b"free",
    b"skip",
    b"pnot",
    b"udta",
    b"uuid",
)
_ANIMATIONS = {b"GIF87a": "GIF", b"GIF89a": "GIF", b"\x89PNG\r\n\x1a\n": "PNG"}


class Container(NamedTuple):
    demuxer: str  # FFmpeg's short name: no other is allowed to open the file
    is_told_by: Callable[[bytes], bool]  # the head of a file
    # Presentation times are the file's own, one for each packet.
    has_packet_times: bool = False


def _magic(*magics: bytes, at: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics, at)


def _is_avi(head: bytes) -> bool:
    return head.startswith(b"RIFF") and head.startswith((b"AVI ", b"AVIX", b"AVI\x19"), 8)


def _is_transport_stream(head: bytes) -> bool:
    return any(_has_packets(head, size) for size in TS_PACKET_SIZES)


def _has_packets(head: bytes, size: int) -> bool:
    """Whether packets of `size` bytes follow each other, the first perhaps cut: recordings start anywhere."""
    for first in range(min(size, len(head))):
        marks = head[first::size][: SYNC_PACKETS + 1]
        # A short file is whole packets; of a long one the head holds more than are looked at.
        if len(marks) >= min(SYNC_PACKETS, max(3, len(head) // size)) and all(mark == SYNC for mark in marks):
            return True
    return False


CONTAINERS = (
    Container("mov", _magic(*_BOXES, at=4), has_packet_times=True),
    Container("avi", _is_avi),
    Container("matroska", _magic(b"\x1aE\xdf\xa3"), has_packet_times=True),
    Container("flv", _magic(b"FLV\x01")),
    Container("ogg", _magic(b"OggS")),
    Container("mpeg", _magic(b"\x00\x00\x01\xba")),
    Container("asf", _magic(b"0&\xb2u\x8ef\xcf\x11")),
    Container("mpegts", _is_transport_stream),
)


def container_of(head: bytes) -> Container | None:
    """Of a file that begins so; None for every kind that is not read."""
    return next((container for container in CONTAINERS if container.is_told_by(head)), None)


def animation_of(head: bytes) -> str | None:
    """Pillow's name of the format of a picture that may be animated; None for every other kind."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _ANIMATIONS.items() if head.startswith(magic)), None)
