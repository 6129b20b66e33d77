"""Walks a picture's file before any decoder reads it: its format, its metadata, and limits on its structure.

The time of a decoder depends on a file's structure, not only on its pixels: each scan of a progressive JPEG
covers the whole picture, and Pillow handles every segment, chunk and tag in Python. So this walks the
structure, a whole segment at each step, and refuses files beyond limits that no real file approaches. The
walk covers what Pillow and the C libraries read, and nothing else.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from pipeline.wire.errors import RequestError

Data = bytes | memoryview
MIB = 1 << 20
MAX_SCANS = 64  # of a JPEG; encoders make 1 to about 20
MAX_SEGMENTS = 2048  # of a JPEG; a colour profile of a MiB takes 16, a signed history of edits some hundred
MAX_EXIF_SEGMENTS = 64  # Pillow joins them one by one
MAX_METADATA_BYTES = 32 * MIB  # of a JPEG: in its APPn and COM segments together
MAX_TABLE_BYTES = 256 << 10  # of a JPEG: all other segments between its scans
MAX_JUNK = 64 << 10  # bytes of no segment before a JPEG's first scan; Pillow reads them one by one
MAX_CHUNKS = 65_536  # of a PNG or WebP: 50 MiB in libpng's pieces of 8 KiB are 6400
MAX_OTHER_CHUNKS = 1024  # of a PNG: neither pixels nor a frame
MAX_GIF_BLOCKS = 16_384  # before a GIF's first frame; a comment of 1 MiB takes 4096
MAX_TAGS = 1024  # of a TIFF's first page
MAX_STRIPS = 65_536  # strips or tiles of a TIFF's first page
MAX_BOXES = 1024  # of an AVIF, at its top level
MAX_RUN_LENGTH_BYTES = 4 * MIB  # of a run-length encoded BMP: Pillow decodes it in Python
MAX_TEXTS = 8  # of a PNG: chunks of text with metadata
MAX_TEXT_BYTES = MIB  # of each, inflated
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")

SOI, EOI, SOS, APP0, APP1, APP15, COM, TEM, JPG = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEF, 0xFE, 0x01, 0xC8
END_OF_JPEG = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[\xc0-\xcf\xd9-\xef\xfe]")  # no stuffing, restart or fill
EXIF_HEAD, XMP_HEAD = b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0"


class Structure(NamedTuple):
    kind: str  # one of `KINDS`, Pillow's names
    exif: tuple[bytes, ...] = ()  # with or without `EXIF_HEAD`; the first valid one counts
    xmp: tuple[bytes, ...] = ()
    lacks_end: bool = False  # a JPEG whose end mark is missing
    png_depth: int = 8  # bits per sample
    webp_size: tuple[int, int] | None = None  # width and height


def walk(data: Data, field: str) -> Structure:
    """Raises RequestError for a file that is no picture of a known kind, or has too many pieces."""
    head = bytes(data[:16])
    try:
        if head.startswith(b"\xff\xd8\xff"):
            return _Jpeg(data, field).walk()
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return _walk_png(data, field)
        if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return _walk_webp(data, field)
        if head.startswith((b"GIF87a", b"GIF89a")):
            return _walk_gif(data, field)
        if head.startswith(b"BM"):
            return _walk_bmp(data, field)
        if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
            return _walk_avif(data, field)
        if head[:4] in (b"II\x2a\0", b"MM\0\x2a", b"II\x2b\0"):
            return _walk_tiff(data, field)
    except struct.error:  # the file ends within a header
        pass
    raise not_a_picture(field)


def not_a_picture(field: str) -> RequestError:
    return RequestError(f"the media is not a picture of a known kind ({', '.join(KINDS)})", field=field)


def _check(number: int, limit: int, what: str, field: str) -> None:
    if number > limit:
        raise RequestError(f"the picture is made up of more than {limit} {what}", field=field)


class _Jpeg:
    def __init__(self, data: Data, field: str) -> None:
        self._data, self._field = data, field
        self._num_segments = self._num_scans = self._num_junk = 0
        self._metadata_bytes = self._table_bytes = 0
        self._exif: list[bytes] = []
        self._xmp: list[bytes] = []

    def walk(self) -> Structure:
        data, at, has_end = self._data, 2, False
        while (found := self._next_marker(at)) is not None:
            at = found + 2
            code = data[found + 1]
            _check(self._count_segment(), MAX_SEGMENTS, "segments", self._field)
            if code == EOI:
                has_end = True
                break
            if code == TEM or 0xD0 <= code <= SOI:  # markers without a segment
                continue
            if at + 2 > len(data):
                break
            (length,) = struct.unpack_from(">H", data, at)
            self._take(code, at + 2, length)
            at += max(length, 2)
        if not self._num_scans:
            raise not_a_picture(self._field)
        return Structure("JPEG", tuple(self._exif), tuple(self._xmp), lacks_end=not has_end)

    def _next_marker(self, at: int) -> int | None:
        if self._num_scans:
            match = _MARKER_IN_SCAN.search(self._data, at)
            return match.start() if match else None
        match = _MARKER.search(self._data, at, at + MAX_JUNK)
        if match is None:
            return None
        self._num_junk += match.start() - at
        _check(self._num_junk, MAX_JUNK, "bytes that belong to nothing", self._field)
        return match.start()

    def _count_segment(self) -> int:
        self._num_segments += 1
        return self._num_segments

    def _take(self, code: int, at: int, length: int) -> None:
        if code == SOS:
            self._num_scans += 1
            _check(self._num_scans, MAX_SCANS, "scans", self._field)
        elif APP0 <= code <= APP15 or code == COM:
            self._metadata_bytes += length
            _check(self._metadata_bytes, MAX_METADATA_BYTES, "bytes of metadata", self._field)
            if code == APP1 and not self._num_scans:
                self._take_metadata(bytes(self._data[at : at + max(length - 2, 0)]))
        elif not self._num_scans and (code < 0xC0 or code == JPG or 0xF0 <= code < COM):
            raise not_a_picture(self._field)  # reserved markers have no defined length
        else:
            self._table_bytes += length
            _check(self._table_bytes, MAX_TABLE_BYTES, "bytes of tables", self._field)

    def _take_metadata(self, body: bytes) -> None:
        if body.startswith(EXIF_HEAD):
            self._exif.append(body)
            _check(len(self._exif), MAX_EXIF_SEGMENTS, "segments of EXIF", self._field)
        elif body.startswith(XMP_HEAD) and len(self._xmp) < MAX_TEXTS:
            self._xmp.append(body[len(XMP_HEAD) :])


def _walk_png(data: Data, field: str) -> Structure:
    exif: list[bytes] = []
    texts: list[tuple[bytes, bytes]] = []
    at, num_chunks, num_others = 8, 0, 0
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        num_chunks += 1
        _check(num_chunks, MAX_CHUNKS, "chunks", field)
        if name == b"IEND":
            break
        if name not in (b"IDAT", b"fdAT", b"fcTL"):
            num_others += 1
            _check(num_others, MAX_OTHER_CHUNKS, "chunks beside its pixels", field)
            if name == b"eXIf" and len(exif) < MAX_TEXTS:
                exif.append(bytes(data[at + 8 : at + 8 + length]))
            elif len(texts) < MAX_TEXTS and _is_metadata(name, data[at + 8 : at + 25]):
                texts.append((name, bytes(data[at + 8 : at + 8 + min(length, MAX_TEXT_BYTES)])))
        at += 12 + length
    profiles = [profile for name, body in texts if (profile := _profile_of(name, body)) is not None]
    exif += [body for kind, body in profiles if kind == "exif"]
    xmp = tuple(body for kind, body in profiles if kind == "xmp")
    return Structure("PNG", tuple(exif), xmp, png_depth=data[24] if len(data) > 24 else 8)


def _is_metadata(name: bytes, key: Data) -> bool:
    is_text = name in (b"tEXt", b"zTXt", b"iTXt")
    return is_text and bytes(key).startswith((b"XML:com.adobe.xmp", b"Raw profile type "))


def _profile_of(name: bytes, body: bytes) -> tuple[str, bytes] | None:
    """Metadata in a chunk of text: XMP by its specification; EXIF or XMP in hex, as ImageMagick writes it."""
    key, _, text = body.partition(b"\0")
    is_packed = name == b"zTXt"
    if name == b"iTXt":
        is_packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]  # after its language and translated keyword
    elif is_packed:
        text = text[1:]  # after the compression method, of which there is one
    if is_packed:
        try:
            text = zlib.decompressobj().decompress(text, MAX_TEXT_BYTES)
        except zlib.error:
            return None
    if key == b"XML:com.adobe.xmp":
        return "xmp", text
    what = key.rpartition(b" ")[2].lower()
    return _unhex(text, "xmp" if what == b"xmp" else "exif") if what in (b"exif", b"app1", b"xmp") else None


def _unhex(text: bytes, kind: str) -> tuple[str, bytes] | None:
    """A raw profile: a line with its name, one with its length, then hexadecimal digits in lines."""
    digits = b"".join(text.strip().split(b"\n", 2)[-1].split())
    try:
        profile = bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))
    except ValueError:
        return None
    return ("xmp", profile[len(XMP_HEAD) :]) if profile.startswith(XMP_HEAD) else (kind, profile)


def _walk_webp(data: Data, field: str) -> Structure:
    exif, xmp = b"", b""
    at, num_chunks = 12, 0
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        num_chunks += 1
        _check(num_chunks, MAX_CHUNKS, "chunks", field)
        if name == b"EXIF":
            exif = exif or bytes(data[at + 8 : at + 8 + length])
        elif name == b"XMP ":
            xmp = xmp or bytes(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return Structure("WEBP", (exif,), (xmp,), webp_size=_webp_size(bytes(data[12:30])))


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas, from the first chunk. Pillow allocates it when it opens the file."""
    if head.startswith(b"VP8X") and len(head) == 18:
        return 1 + int.from_bytes(head[12:15], "little"), 1 + int.from_bytes(head[15:18], "little")
    if head.startswith(b"VP8L"):
        bits = int.from_bytes(head[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None  # a single frame has at most 16383 pixels on a side


def _walk_gif(data: Data, field: str) -> Structure:
    """Walks to the first frame; nothing after it is read."""
    flags = data[10] if len(data) > 12 else 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    num_blocks = 0
    is_inside = False  # an extension: blocks, each after its length, up to an empty one
    while at < len(data):
        num_blocks += 1
        _check(num_blocks, MAX_GIF_BLOCKS, "blocks before its first frame", field)
        code = data[at]
        if is_inside:
            is_inside = code != 0
            at += 1 + code
        elif code == 0x2C:
            return Structure("GIF")
        elif code == 0x3B:
            break
        else:
            is_inside = code == 0x21
            at += 2 if is_inside else 1
    raise not_a_picture(field)


def _walk_bmp(data: Data, field: str) -> Structure:
    (head_size,) = struct.unpack_from("<I", data, 14)
    is_run_length = head_size >= 40 and struct.unpack_from("<I", data, 30)[0] in (1, 2)
    if is_run_length:
        _check(len(data), MAX_RUN_LENGTH_BYTES, "bytes, run-length encoded", field)
    return Structure("BMP")


def _walk_avif(data: Data, field: str) -> Structure:
    at = num_boxes = 0
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
        num_boxes += 1
        _check(num_boxes, MAX_BOXES, "boxes", field)
        if size < 8:  # to the end of the file
            break
        at += size
    return Structure("AVIF")


def _walk_tiff(data: Data, field: str) -> Structure:
    order = "<" if data[0] == ord("I") else ">"
    is_big = data[2] == 43
    (at,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    (num_tags,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, at)
    _check(num_tags, MAX_TAGS, "tags", field)
    at += 8 if is_big else 2
    for _ in range(num_tags):
        tag, _, count = struct.unpack_from(order + ("HHQ" if is_big else "HHI"), data, at)
        if tag in (273, 279, 324, 325):  # offsets and lengths of strips and tiles
            _check(count, MAX_STRIPS, "strips or tiles", field)
        at += 20 if is_big else 12
    return Structure("TIFF")
