"""Options of preprocessing: which media may come from where, how large, and how long it may take."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.base import at_least, option
from pipeline.wire.limits import MAX_ITEMS

HTTP_URL = re.compile(r"http://([^\s/?#@]+@)?([^\s/?#@:\[\]]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?/?")
CONTACT = re.compile(r"[ !-'*-~]{0,200}")  # stands in round brackets in a header
# Of all requests together, and of requests: each takes at most four messages on an edge, and all of them stay
# below the high-water mark.
MAX_OPEN_CHUNKS = 1 << 16
# Times `max_open_requests`, for resubmitted requests whose credits were taken meanwhile.
MAX_OVERLOAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessConfig:
    allowed_local_media_path: str = option(
        "", "folder from which requests may name files; without it none", metavar="FOLDER"
    )
    allowed_media_domains: tuple[str, ...] = option(
        (), "if given, the only hosts that media URLs may name", metavar="HOST"
    )
    allow_private_media: bool = option(
        False, "let media URLs reach private, loopback and link-local addresses"
    )
    media_proxy: str = option(
        "",
        "HTTP proxy for media URLs: it resolves their names, and has to keep them from private "
        "addresses; no variable of the environment is read (default: none)",
        metavar="URL",
    )
    media_contact: str = option(
        "",
        "mail address or URL of who runs this server, for the User-Agent that hosts of media see: some "
        "demand it",
        metavar="TEXT",
    )
    media_timeout_s: float = option(10.0, "time for one media download, in seconds", metavar="SECONDS")
    max_media_mib: int = option(50, "largest media file, in MiB", metavar="MIB")
    max_image_pixels: int = option(
        64_000_000, "largest picture before resizing, in pixels, judged by its header", metavar="PIXELS"
    )
    max_items_per_request: int = option(64, "most pictures and videos in one request", metavar="N")
    min_pixels: int | None = option(
        None, "pictures are enlarged to at least this (default: the model's)", metavar="PIXELS"
    )
    max_pixels: int | None = option(
        None,
        "pictures, and frames of videos, are reduced to at most this (default: the model's; on a CPU 1280 "
        "tokens)",
        metavar="PIXELS",
    )
    max_video_mib: int = option(
        256, "largest video file, in MiB; it is kept in a temporary file without a name", metavar="MIB"
    )
    max_video_frames: int | None = option(
        None, "most frames of a video that the model sees (default: the model's)", metavar="N"
    )
    video_reader: str = option(
        "pyav",
        "what decodes videos; decord: from the extra vlm-pipeline[decord], right in fewer containers",
        choices=("pyav", "decord"),
    )
    picture_timeout_s: float = option(10.0, "processor time to read a picture, in seconds", metavar="SECONDS")
    video_timeout_s: float = option(60.0, "processor time to read a video, in seconds", metavar="SECONDS")
    media_memory_mib: int = option(4096, "memory to read a picture or piece of video, in MiB", metavar="MIB")
    pixel_pool_mib: int = option(
        256, "memory for decoded pixels on their way to the ViTs, in MiB", metavar="MIB"
    )
    max_open_media_mib: int = option(
        1024,
        "texts and encoded media of all open requests together, in memory and in files, in MiB; see "
        "docs/fairness.md",
        metavar="MIB",
    )
    preprocess_memory_mib: int | None = option(
        None,
        "memory that preprocessing may take beside its pool and the processes that read media, in MiB "
        "(default: what the limits of media allow for)",
        metavar="MIB",
    )
    max_open_requests: int = option(
        2048,
        "requests in the pipeline at once; a tenant that has its share gets 429, then all get 503",
        metavar="N",
    )
    allow_priority: tuple[str, ...] = option(
        (),
        "name of an API or CURVE key whose requests may have a priority, or all; several may be given",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        at_least(
            self,
            max_media_mib=1,
            max_image_pixels=1,
            max_items_per_request=0,
            pixel_pool_mib=0,
            max_open_requests=1,
            max_open_media_mib=1,
            media_timeout_s=0.1,
            max_video_mib=1,
            picture_timeout_s=0.01,
            video_timeout_s=0.1,
            media_memory_mib=1,
            preprocess_memory_mib=1,
        )
        at_least(self, min_pixels=1, max_pixels=1, max_video_frames=2)
        if self.max_open_requests > MAX_OPEN_CHUNKS:
            raise ValueError(
                f"max_open_requests must be at most {MAX_OPEN_CHUNKS}, got {self.max_open_requests}"
            )
        if self.max_items_per_request > MAX_ITEMS:
            raise ValueError(
                f"max_items_per_request must be at most {MAX_ITEMS}, got {self.max_items_per_request}"
            )
        if self.video_reader == "decord" and importlib.util.find_spec("decord") is None:
            raise ValueError("video_reader 'decord' needs the package decord: install vlm-pipeline[decord]")
        if self.allowed_local_media_path and not Path(self.allowed_local_media_path).is_dir():
            raise ValueError(f"allowed_local_media_path {self.allowed_local_media_path!r} is no folder")
        self._check_media_options()
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels must be at most max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )

    def _check_media_options(self) -> None:
        if self.media_proxy and not HTTP_URL.fullmatch(self.media_proxy):
            raise ValueError("media_proxy must be http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT")
        if not CONTACT.fullmatch(self.media_contact):
            limits = "at most 200 ASCII characters without brackets"
            raise ValueError(f"media_contact must be {limits}, got {self.media_contact!r}")
