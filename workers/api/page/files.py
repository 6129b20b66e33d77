"""The page's files: read and packed once, when they are first asked for."""

from __future__ import annotations

import functools
import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
PACKED = (".css", ".html", ".js", ".json", ".svg", ".txt")  # pictures are packed by themselves


class PageFile:
    """One file, and what HTTP says of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content_type = TYPES[path.suffix]

    @functools.cached_property
    def body(self) -> bytes:
        return self._path.read_bytes()

    @functools.cached_property
    def packed(self) -> bytes | None:
        """The body by gzip; None where packing is no use."""
        if self._path.suffix not in PACKED:
            return None
        packed = gzip.compress(self.body, compresslevel=9, mtime=0)
        return packed if len(packed) < len(self.body) else None

    @functools.cached_property
    def tag(self) -> str:
        """Names the content, for `If-None-Match`. Packed and plain answers have the same one: it is weak."""
        return f'W/"{hashlib.sha256(self.body).hexdigest()[:20]}"'


def files_under(folder: Path) -> Mapping[str, PageFile]:
    """All files of the known types, by their path below `folder`. No other path can be asked for."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in TYPES and path.is_file())
    return {path.relative_to(folder).as_posix(): PageFile(path) for path in found}
