"""`mm_processor_kwargs` and `media_io_kwargs`, as vLLM's clients write them: what the family's processor and
the reading of media are told, for all pictures and videos of a request.

They become settings of the parts: docs/parts.md. What would change the answer and is not served is refused by
name. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.prompts import Chat, ImagePart, Part, TextPart, VideoPart
from workers.api.json_bodies import is_unset

Json = Mapping[str, Any]
Settings = dict[str, int | float]
PROCESSOR, IO = "mm_processor_kwargs", "media_io_kwargs"
AREAS = ("min_pixels", "max_pixels")
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
COUNTS = {"num_frames": "nframes", "min_frames": "min_frames", "max_frames": "max_frames"}
# Steps that every picture goes through, and the only form in which one is read.
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_sample_frames")
IMAGE_MODE = "RGB"
# A part that says one of these itself takes none of them from the request.
OF_FRAMES = ("fps", "nframes", "min_frames", "max_frames")
OF_SIZE = (*AREAS, "resized_height", "resized_width", "total_pixels")
ALL = -1  # of `num_frames`; of `fps`: as many as there are
MAX_COUNT = 2**31 - 1


class MediaSettings(NamedTuple):
    pictures: Settings
    videos: Settings


def with_media_settings(chat: Chat, processor: Json | None, io: Json | None) -> Chat:
    """Raises RequestError, naming the key, for one that is not served or has a senseless value."""
    if not processor and not io:
        return chat
    pictures, videos = _of_processor(processor or {}, _has_videos(chat))
    frames = _of_reading(io or {})
    if frames and any(name in videos for name in OF_FRAMES):
        raise RequestError(f"{PROCESSOR} and {IO} both say which frames are seen", field=f"{IO}.video")
    settings = MediaSettings(pictures, {**videos, **frames})
    messages = tuple(
        msgspec.structs.replace(message, content=tuple(_with(part, settings) for part in message.content))
        if isinstance(message.content, tuple)
        else message
        for message in chat.messages
    )
    return msgspec.structs.replace(chat, messages=messages)


def _has_videos(chat: Chat) -> bool:
    contents = (message.content for message in chat.messages if isinstance(message.content, tuple))
    return any(isinstance(part, VideoPart) for content in contents for part in content)


def _with(part: Part, settings: MediaSettings) -> Part:
    if isinstance(part, TextPart):
        return part
    if isinstance(part, ImagePart):
        return msgspec.structs.replace(part, **_left(part, settings.pictures, OF_SIZE))
    new = _left(part, settings.videos, OF_SIZE)
    if not part.frames:  # of a list all frames are seen
        new |= _left(part, settings.videos, OF_FRAMES)
    return msgspec.structs.replace(part, **new)


def _left(part: ImagePart | VideoPart, settings: Settings, names: tuple[str, ...]) -> Settings:
    """The settings of these names, for a part that has none of them."""
    if any(getattr(part, name, None) is not None for name in names):
        return {}
    return {name: settings[name] for name in names if name in settings}


def _of_processor(given: Json, has_videos: bool) -> MediaSettings:
    pictures: Settings = {}
    videos: Settings = {}
    for name, value in given.items():
        field = f"{PROCESSOR}.{name}"
        if is_unset(value):
            continue
        if name in ("images_kwargs", "videos_kwargs"):
            of_kind = pictures if name == "images_kwargs" else videos
            for inner, inner_value in _object(value, field).items():
                is_frame = inner == "fps" or inner in COUNTS
                if (inner == "size" and of_kind is videos) or (is_frame and of_kind is pictures):
                    raise _unserved(f"{field}.{inner}")
                of_kind |= _setting(inner, inner_value, f"{field}.{inner}")
            continue
        found = _setting(name, value, field)
        if name == "size" and has_videos:
            # Families differ: of one frame, or of all frames together.
            what = "size is that of pictures: with videos, images_kwargs.size and max_pixels (of a frame)"
            raise RequestError(what, field=field)
        videos |= found
        pictures |= {key: number for key, number in found.items() if key in AREAS}
    return MediaSettings(pictures, videos)


def _setting(name: str, value: object, field: str) -> Settings:
    if is_unset(value):
        return {}
    if name in STEPS:
        if value is not True:
            raise RequestError(f"{name} is always true here, got {shown(value)}", field=field)
        return {}
    if name == "size":
        edges = _object(value, field)
        if unknown := [edge for edge in edges if edge not in EDGES]:
            raise _unserved(f"{field}.{unknown[0]}")
        return {EDGES[edge]: _whole(area, f"{field}.{edge}") for edge, area in edges.items()}
    if name in AREAS:
        return {name: _whole(value, field)}
    if name in COUNTS:
        return {COUNTS[name]: _whole(value, field)}
    if name == "fps":
        return {name: _rate(value, field)}
    raise _unserved(field)


def _of_reading(given: Json) -> Settings:
    """How many frames of a video are seen: `num_frames` at most, spread over it, or `fps` a second."""
    for kind, inner in given.items():
        served = {"video": ("num_frames", "fps"), "image": ("image_mode",)}.get(kind, ())
        for name, value in _object(inner, f"{IO}.{kind}").items():
            if not is_unset(value) and (name not in served or (kind == "image" and value != IMAGE_MODE)):
                raise _unserved(f"{IO}.{kind}.{name}")
    video = given.get("video") or {}
    count, fps = (None if is_unset(value) else value for value in (video.get("num_frames"), video.get("fps")))
    settings: Settings = {}
    if fps is not None and fps != ALL:
        settings["fps"] = _rate(fps, f"{IO}.video.fps")
    if count is not None and count != ALL:
        settings["max_frames"] = _whole(count, f"{IO}.video.num_frames")
    if count is not None and "fps" not in settings:
        settings["min_frames"] = settings.get("max_frames", MAX_COUNT)
    return settings


def _unserved(field: str) -> RequestError:
    return RequestError(f"{field} is not served by this server", field=field)


def _object(value: object, field: str) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{field} must be an object, got {shown(value)}", field=field)
    return value


def _whole(value: object, field: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value <= MAX_COUNT
        or value % 1
    ):
        raise RequestError(f"{field} must be a whole number of 1 or more, got {shown(value)}", field=field)
    return int(value)


def _rate(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RequestError(f"{field} must be a number above 0, got {shown(value)}", field=field)
    return float(value)
