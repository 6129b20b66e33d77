"""The orientation of a picture, from its metadata: 1 is upright; broken metadata count as 1.

EXIF takes precedence over XMP, as in viewers. Two formats have their own: an AVIF its container's
transformations, which Pillow reports as EXIF; a TIFF its own tag, which Pillow applies when it decodes.
"""

from __future__ import annotations

import re
import struct

from PIL import Image

from workers.preprocess.picture_files import EXIF_HEAD, MAX_TEXT_BYTES, Structure

TAG = 0x0112
SWAPS_SIDES = (5, 6, 7, 8)
MAX_ENTRIES = 4096  # of an EXIF directory
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NAMESPACE = re.compile(rb"xmlns:([A-Za-z_][\w.-]{0,63})\s{0,9}=\s{0,9}[\"']http://ns\.adobe\.com/tiff/1\.0/")


def orientation(structure: Structure, image: Image.Image) -> int:
    """The transformation that remains to be applied, 1 to 8 as EXIF numbers them."""
    if structure.kind == "AVIF":
        return from_exif(image.info.get("exif", b"")) or 1
    if structure.kind == "TIFF":
        return _of_tiff(image)
    for exif in structure.exif:
        if found := from_exif(exif):
            return found
    for xmp in structure.xmp:
        if found := from_xmp(xmp):
            return found
    return 1


def _of_tiff(image: Image.Image) -> int:
    """Removes the XMP: Pillow would apply its orientation at decoding, without reporting it first."""
    xmp = image.info.pop("xmp", b"")
    own = getattr(image, "tag_v2", {}).get(TAG)
    if isinstance(own, int) and 1 <= own <= 8:
        return 1
    return (isinstance(xmp, bytes) and from_xmp(xmp)) or 1


def from_exif(data: bytes) -> int | None:
    """From a TIFF structure, with `EXIF_HEAD` or without. None without a valid orientation."""
    if data.startswith(EXIF_HEAD):
        data = data[len(EXIF_HEAD) + 1 :]
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, at)
        for entry in range(at + 2, at + 2 + 12 * min(count, MAX_ENTRIES), 12):
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            if tag == TAG:
                form = {1: "B", 3: "H", 4: "I"}.get(kind)
                value = struct.unpack_from(order + form, data, entry + 8)[0] if form else 0
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def from_xmp(data: bytes) -> int | None:
    """From an XMP packet in UTF-8 or UTF-16: tiff:Orientation, attribute or element, with any prefix."""
    text = data[:MAX_TEXT_BYTES].replace(b"\0", b"")
    prefixes = dict.fromkeys([b"tiff", *_NAMESPACE.findall(text)[:4]])
    names = b"|".join(map(re.escape, prefixes))
    pattern = rb"(?:%b):Orientation(?:\s{0,9}=\s{0,9}[\"']|[^>=]{0,99}>)\s{0,99}([1-8])\s{0,99}[\"'<]" % names
    match = re.search(pattern, text)
    return int(match[1]) if match else None
