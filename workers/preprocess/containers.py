"""Which container a file is, by its first bytes: FFmpeg is told, and never guesses.

FFmpeg also knows lists of other files (HLS, DASH, concat, SDP) and would open what these name.
Only containers that hold all that they show are listed here.
"""

from __future__ import annotations

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
_MAGIC = {
    b"\x1aE\xdf\xa3": "matroska",
    b"FLV\x01": "flv",
    b"OggS": "ogg",
    b"\x00\x00\x01\xba": "mpeg",
    b"0&\xb2u\x8ef\xcf\x11": "asf",
}
_ANIMATIONS = {b"GIF87a": "GIF", b"GIF89a": "GIF", b"\x89PNG\r\n\x1a\n": "PNG"}


def demuxer_of(head: bytes) -> str | None:
    """FFmpeg's short name of the demuxer for a file that begins so; None for every other kind."""
    if head[4:8] in _BOXES:
        return "mov"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX", b"AVI\x19"):
        return "avi"
    for magic, demuxer in _MAGIC.items():
        if head.startswith(magic):
            return demuxer
    return "mpegts" if any(_is_transport_stream(head, size) for size in TS_PACKET_SIZES) else None


def animation_of(head: bytes) -> str | None:
    """Pillow's name of the format of a picture that may be animated; None for every other kind."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _ANIMATIONS.items() if head.startswith(magic)), None)


def _is_transport_stream(head: bytes, size: int) -> bool:
    """Whether packets of `size` bytes follow each other, the first perhaps cut: recordings start anywhere."""
    for first in range(min(size, len(head))):
        marks = head[first::size][: SYNC_PACKETS + 1]
        # A short file is whole packets; of a long one the head holds more than are looked at.
        if len(marks) >= min(SYNC_PACKETS, max(3, len(head) // size)) and all(mark == SYNC for mark in marks):
            return True
    return False
