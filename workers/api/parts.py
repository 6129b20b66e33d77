"""Converts a chat's content parts from the clients' forms to the pipeline's.

OpenAI's clients, vLLM's and Qwen's own tools put the same settings beside a URL or inside its object, and
Qwen's tools have their own part types: docs/parts.md lists what is served. An unserved key that would change
the answer is refused by name. Numbers are only checked for the range of the wire: their limits depend on the
model and on the media, so preprocess checks those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.limits import MAX_MESSAGES, MAX_PARTS
from pipeline.wire.prompts import ImagePart, Part, TextPart, VideoPart
from workers.api.json_bodies import is_unset
from workers.api.keys import refuse_unserved_keys

Fields = Mapping[str, Any]
MAX_PIECES = 1 << 14  # more than the limits of messages, parts and calls together leave room for
MAX_NUMBER = 2.0**63  # what a wire integer holds
LOW_DETAIL_PIXELS = 512 * 512  # the size at which OpenAI's models see a picture with `detail: "low"`
FULL_DETAILS = ("auto", "high", "original")
# The keys that may hold the URL, by the part's type.
IMAGE_SOURCES = {
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "image": ("image", "image_url", "url"),
}
VIDEO_SOURCES = {"video_url": ("video_url",), "video": ("video", "video_url", "url")}
TEXTS = ("text", "input_text", "output_text")
FILE = "file"
TYPES = (*TEXTS, *IMAGE_SOURCES, *VIDEO_SOURCES, FILE)
# Settings by the kind of their number: an area may be a float, as clients compute some of them.
IMAGE_SETTINGS = {
    "min_pixels": "area",
    "max_pixels": "area",
    "resized_height": "whole",
    "resized_width": "whole",
}
VIDEO_SETTINGS = {
    **IMAGE_SETTINGS,
    "total_pixels": "area",
    "fps": "real",
    "nframes": "whole",
    "min_frames": "whole",
    "max_frames": "whole",
    "video_start": "real",  # seconds
    "video_end": "real",
    "timestamps": "reals",  # seconds
}
# Qwen's own tools say so of a list of frames when they were taken: the former is our `fps`.
SAMPLE_RATE, RAW_RATE = "sample_fps", "raw_fps"
RATES_OF_FRAMES = {SAMPLE_RATE: "real", RAW_RATE: "real"}
SIZES = {*IMAGE_SETTINGS, "total_pixels"}  # these override `detail`
# Keys that never change the answer: they are ignored.
LABELS = {
    *("cache_control", "prompt_cache_breakpoint", "annotations", "citations", "id", "index", "name"),
    *(
        "title",
        "alt",
        "filename",
        "format",
        "mime_type",
        "media_type",
        "provider_options",
        "provider_metadata",
    ),
}


def check_counts(contents: Sequence[object]) -> None:
    """Checks the number of messages and of all parts, before they are converted. Raises RequestError."""
    if (count := len(contents)) > MAX_MESSAGES:
        raise RequestError(f"there are {count} messages, the limit is {MAX_MESSAGES}", field="messages")
    if (count := sum(len(content) for content in contents if isinstance(content, list))) > MAX_PARTS:
        raise RequestError(f"the messages have {count} parts, the limit is {MAX_PARTS}", field="messages")


def check_pieces(contents: Sequence[object], field: str) -> None:
    """The same where a client's items and blocks are yet to become messages, parts and calls, so that their
    exact limits come later."""
    count = len(contents) + sum(len(content) for content in contents if isinstance(content, list))
    if count > MAX_PIECES:
        what = f"there are {count} items, blocks and parts in {field}, the limit is {MAX_PIECES}"
        raise RequestError(what, field=field)


def to_part(given: Fields, field: str) -> Part:
    """Raises RequestError, naming the key at fault below `field`."""
    kind = _type_of(given, field)
    if kind in TEXTS:
        return _text(given, field)
    if kind == FILE:
        return _file(given, field)
    if kind in IMAGE_SOURCES:
        return _image(given, field, IMAGE_SOURCES[kind])
    return _video(given, field, VIDEO_SOURCES[kind])


def _type_of(given: Fields, field: str) -> str:
    kind = given.get("type")
    if kind is None:  # vLLM's short form: the only source key is the type
        named = [name for name in TYPES if not is_unset(given.get(name))]
        if len(named) != 1:
            raise RequestError(f"a part has a type: {', '.join(TYPES)}", field=f"{field}.type")
        return named[0]
    if kind not in TYPES:
        what = f"{shown(kind)} is no type of a part; served are {', '.join(TYPES)}"
        raise RequestError(what, field=f"{field}.type")
    return str(kind)


def _text(given: Fields, field: str) -> TextPart:
    text = given.get("text")
    if not isinstance(text, str):
        raise RequestError(f"the text of a part must be a string, got {shown(text)}", field=f"{field}.text")
    _refuse_unserved(given, ("type", "text"), field)
    return TextPart(text)


def _file(given: Fields, field: str) -> Part:
    """A picture or video, as clients write one that they call a file: its data URL says which it is."""
    named = given.get(FILE)
    file = named if isinstance(named, dict) else given
    place = f"{field}.{FILE}" if file is named else field
    data = file.get("file_data") or file.get("file_url")
    if not isinstance(data, str):
        raise RequestError(
            "a file comes with its data, as a data URL, in file_data", field=f"{place}.file_data"
        )
    _refuse_unserved(file, ("type", "file_data", "file_url"), place)
    kind = data[5:].partition("/")[0].lower() if data[:5].lower() == "data:" else ""
    if kind == "image":
        return ImagePart(url=data)
    if kind == "video":
        return VideoPart(url=data)
    what = "of files only pictures and videos are served, as data:image/… or data:video/…"
    raise RequestError(f"{what}, got {shown(data[:40])}", field=f"{place}.file_data")


def _image(given: Fields, field: str, sources: tuple[str, ...]) -> ImagePart:
    keys = _Keys(given, field, sources)
    url = keys.source
    if not isinstance(url, str):
        what = f"the URL of a picture must be a string, got {shown(url)}"
        raise RequestError(what, field=keys.source_field)
    settings, uuid = keys.settings(IMAGE_SETTINGS), keys.uuid()
    keys.refuse_others()
    if not url and not uuid:
        raise RequestError("the URL of a picture must not be empty", field=keys.source_field)
    return ImagePart(url=url, uuid=uuid, **settings)


def _video(given: Fields, field: str, sources: tuple[str, ...]) -> VideoPart:
    keys = _Keys(given, field, sources)
    urls = keys.source if isinstance(keys.source, list) else [keys.source]
    if not all(isinstance(url, str) for url in urls):
        what = f"the URL of a video must be a string, or a list of them: its frames; got {shown(keys.source)}"
        raise RequestError(what, field=keys.source_field)
    settings, uuid = keys.settings(VIDEO_SETTINGS), keys.uuid()
    if isinstance(keys.source, list):
        settings |= _rate_of_frames(keys, settings.get("fps"))
    keys.refuse_others()
    if not all(urls) and not (urls == [""] and uuid):
        what = "the URL of a video, and of each frame in a list of them"
        raise RequestError(f"{what}, must not be empty", field=keys.source_field)
    if not isinstance(keys.source, list):
        return VideoPart(url=urls[0], uuid=uuid, **settings)
    if uuid:
        raise RequestError("a list of frames has no uuid", field=f"{field}.uuid")
    return VideoPart(frames=tuple(ImagePart(url=url) for url in urls), **settings)


def _rate_of_frames(keys: _Keys, fps: float | None) -> dict[str, Any]:
    """The `fps` that a list of frames has by the names of Qwen's tools. For a `raw_fps` of their own frames
    would get times that are not theirs, so that it can only repeat the rate."""
    given = keys.numbers(RATES_OF_FRAMES)
    rate = given.get(SAMPLE_RATE, fps)
    if fps is not None and fps != rate:
        what = (
            f"fps and {SAMPLE_RATE} of a list of frames mean the same: {shown(fps)} and {shown(rate)} differ"
        )
        raise RequestError(what, field=keys.field_of(SAMPLE_RATE))
    if (raw := given.get(RAW_RATE)) is not None and raw != rate:
        what = f"{RAW_RATE} of a list of frames must equal its {SAMPLE_RATE}, got {shown(raw)}"
        raise RequestError(what, field=keys.field_of(RAW_RATE))
    return {} if rate is None else {"fps": rate}


class _Keys:
    """The keys of a part and of its URL's object. `refuse_others` refuses the keys that were not taken."""

    def __init__(self, given: Fields, field: str, sources: tuple[str, ...]) -> None:
        self._places = {field: given}
        named = [name for name in sources if not is_unset(given.get(name))]
        if len(named) > 1:
            raise RequestError(f"{named[0]} and {named[1]} are both given", field=f"{field}.{named[1]}")
        name = named[0] if named else sources[0]
        self.source_field = f"{field}.{name}"
        self._taken = {field: {"type", name}, self.source_field: {"url"}}
        self.source: Any = given.get(name) or ""
        if isinstance(self.source, dict):
            self._places[self.source_field] = self.source
            self.source = self.source.get("url") or ""

    def settings(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """The settings given in the part or in its URL's object."""
        found = self.numbers(kinds)
        if self._take("detail", _detail) == "low" and not found.keys() & SIZES:
            found["max_pixels"] = LOW_DETAIL_PIXELS
        return found

    def numbers(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        found = {name: self._take(name, partial(_setting, kind)) for name, kind in kinds.items()}
        return {name: value for name, value in found.items() if value is not None}

    def field_of(self, name: str) -> str:
        """Where a key is given."""
        return next(
            f"{place}.{name}" for place, given in self._places.items() if not is_unset(given.get(name))
        )

    def uuid(self) -> str:
        return str(self._take("uuid", _string) or "")

    def refuse_others(self) -> None:
        for place, given in self._places.items():
            _refuse_unserved(given, self._taken[place], place)

    def _take(self, name: str, read: Callable[[object, str], Any]) -> Any:
        """The value of a key; None if it is missing. Raises RequestError for two different values."""
        values = []
        for place, given in self._places.items():
            self._taken[place].add(name)
            if not is_unset(given.get(name)):
                values.append(read(given[name], f"{place}.{name}"))
        if len(values) == 2 and values[0] != values[1]:
            what = f"beside the URL {shown(values[0])}, in its object {shown(values[1])}"
            raise RequestError(
                f"{name} is given twice and differs: {what}", field=f"{self.source_field}.{name}"
            )
        return values[0] if values else None


def _refuse_unserved(given: Fields, served: Container[str], field: str) -> None:
    refuse_unserved_keys(given, served, LABELS, "a part", field)


def _setting(kind: str, value: object, field: str) -> int | float | tuple[float, ...]:
    if kind != "reals":
        return _number(kind, value, field)
    if not isinstance(value, list):
        name = field.rpartition(".")[2]
        raise RequestError(f"{name} must be a list of numbers, got {shown(value)}", field=field)
    return tuple(_number("real", number, f"{field}[{index}]") for index, number in enumerate(value))


def _number(kind: str, value: object, field: str) -> int | float:
    name = field.rpartition(".")[2]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {shown(value)}", field=field)
    if not -MAX_NUMBER < value < MAX_NUMBER:  # NaN is out of every range
        raise RequestError(f"{name} must be a number that 64 bits hold, got {shown(value)}", field=field)
    if kind == "real":
        return float(value)
    if kind == "whole" and value != math.floor(value):
        raise RequestError(f"{name} must be a whole number, got {shown(value)}", field=field)
    return math.floor(value)


def _detail(value: object, field: str) -> str:
    detail = value.lower() if isinstance(value, str) else ""
    if detail != "low" and detail not in FULL_DETAILS:
        known = ", ".join(("low", *FULL_DETAILS))
        raise RequestError(f"detail must be one of {known}, got {shown(value)}", field=field)
    return "low" if detail == "low" else "full"


def _string(value: object, field: str) -> str:
    if not isinstance(value, str):
        name = field.rpartition(".")[2]
        raise RequestError(f"{name} must be a string, got {shown(value)}", field=field)
    return value
