"""Content parts in the spellings of OpenAI's clients, vLLM's and Qwen's own tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ImagePart, Part, TextPart, VideoPart
from tests.workers.api.endpoints.test_chat import decode_request
from workers.api.chat_request import to_messages
from workers.api.parts import LOW_DETAIL_PIXELS, to_part

URL = "http://x/y"
SIZES = {"min_pixels": 12_544, "max_pixels": 19_600}
SIDES = {"resized_height": 112, "resized_width": 140}
SAMPLING = {"nframes": 8, "total_pixels": 10**6, "video_start": 0.5, "video_end": 2.0}
RATE = {"fps": 2.0, "min_frames": 4, "max_frames": 16}
TIMES = {"timestamps": [0.0, 0.5]}


def image(**keys: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": URL}, **keys}


def video(**keys: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": URL}, **keys}


@pytest.mark.parametrize("settings", [SIZES, SIDES, {"max_pixels": 19_600.9, "min_pixels": None}], ids=str)
def test_a_pictures_settings_count_in_both_places(settings: dict[str, Any]) -> None:
    whole = {name: int(value) for name, value in settings.items() if value is not None}
    expected = ImagePart(url=URL, **whole)
    assert to_part(image(**settings), "f") == expected
    assert to_part({"type": "image_url", "image_url": {"url": URL, **settings}}, "f") == expected
    assert to_part({"type": "image", "image": URL, **settings}, "f") == expected
    assert to_part({"type": "image_url", "image_url": {"url": URL, **settings}, **settings}, "f") == expected


@pytest.mark.parametrize("settings", [SIZES, SIDES, SAMPLING, RATE], ids=str)
def test_a_videos_settings_count_in_both_places(settings: dict[str, Any]) -> None:
    expected = VideoPart(url=URL, **settings)
    assert to_part(video(**settings), "f") == expected
    assert to_part({"type": "video_url", "video_url": {"url": URL, **settings}}, "f") == expected
    assert to_part({"type": "video", "video": URL, **settings}, "f") == expected
    listed = to_part({"type": "video", "video": [URL, URL], **settings}, "f")
    assert listed == VideoPart(frames=(ImagePart(url=URL),) * 2, **settings)


def test_times_of_frames_are_a_list_of_numbers() -> None:
    part = VideoPart(frames=(ImagePart(url=URL),) * 2, timestamps=(0.0, 0.5))
    assert to_part({"type": "video", "video": [URL, URL], **TIMES}, "f") == part
    assert to_part({"type": "video_url", "video_url": {"url": [URL, URL], **TIMES}}, "f") == part
    for times, field in ((1.0, "f.timestamps"), ([0.0, "1"], "f.timestamps[1]"), ([True], "f.timestamps[0]")):
        with pytest.raises(RequestError, match="number") as caught:
            to_part({"type": "video", "video": [URL, URL], "timestamps": times}, "f")
        assert caught.value.info.field == field


@pytest.mark.parametrize(
    "rates",
    [
        {"sample_fps": 4},
        {"sample_fps": 4.0, "raw_fps": 4},
        {"sample_fps": 4.0, "fps": 4},
        {"fps": 4.0, "raw_fps": 4.0, "sample_fps": None},
    ],
    ids=str,
)
def test_a_list_of_frames_has_its_rate_by_the_names_of_qwens_tools(rates: dict[str, Any]) -> None:
    part = VideoPart(frames=(ImagePart(url=URL),) * 2, fps=4.0)
    assert to_part({"type": "video", "video": [URL, URL], **rates}, "f") == part
    assert to_part({"type": "video_url", "video_url": {"url": [URL, URL], **rates}}, "f") == part


@pytest.mark.parametrize(
    ("rates", "field"),
    [
        ({"sample_fps": 4, "fps": 2}, "sample_fps"),
        ({"sample_fps": 4, "raw_fps": 24}, "raw_fps"),
        ({"fps": 4, "raw_fps": 24}, "raw_fps"),
        ({"raw_fps": 2.0}, "raw_fps"),
        ({"sample_fps": "4"}, "sample_fps"),
        ({"sample_fps": float("nan")}, "sample_fps"),
    ],
    ids=str,
)
def test_rates_of_frames_that_differ_are_refused_by_name(rates: dict[str, Any], field: str) -> None:
    for part, place in (
        ({"type": "video", "video": [URL, URL], **rates}, f"f.{field}"),
        ({"type": "video_url", "video_url": {"url": [URL], **rates}}, f"f.video_url.{field}"),
    ):
        with pytest.raises(RequestError, match=field) as caught:
            to_part(part, "f")
        assert (caught.value.info.status, caught.value.info.field) == (400, place)


@pytest.mark.parametrize("name", ["sample_fps", "raw_fps"])
def test_one_file_has_no_rate_of_frames(name: str) -> None:
    for part in (video(**{name: 2.0, "fps": 2.0}), image(**{name: 2.0})):
        with pytest.raises(RequestError, match=name) as caught:
            to_part(part, "f")
        assert caught.value.info.field == f"f.{name}"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": URL}, ImagePart(url=URL)),
        ({"image_url": {"url": URL}}, ImagePart(url=URL)),
        ({"video_url": URL}, VideoPart(url=URL)),
        ({"text": "a"}, TextPart("a")),
        ({"type": "image", "image_url": {"url": URL}}, ImagePart(url=URL)),
        ({"type": "image", "url": URL}, ImagePart(url=URL)),
        ({"type": "video", "video": {"url": URL}}, VideoPart(url=URL)),
        ({"type": "image_url", "image_url": {}, "uuid": "u"}, ImagePart(uuid="u")),
        ({"type": "image_url", "image_url": None, "uuid": "u"}, ImagePart(uuid="u")),
        ({"type": "image_url", "uuid": "u"}, ImagePart(uuid="u")),
        ({"type": "video_url", "video_url": None, "uuid": "u"}, VideoPart(uuid="u")),
        ({"type": "text", "text": ""}, TextPart("")),
    ],
    ids=str,
)
def test_spellings(part: dict[str, Any], expected: object) -> None:
    assert to_part(part, "f") == expected


def test_detail() -> None:
    for detail in ("auto", "high", "original", "AUTO", "High", None, ""):
        part = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
        assert to_part(part, "f") == ImagePart(url=URL)
    for detail in ("low", "LOW"):
        low = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
        assert (
            to_part(low, "f")
            == to_part(image(detail=detail), "f")
            == ImagePart(url=URL, max_pixels=LOW_DETAIL_PIXELS)
        )
        assert to_part({**low, **SIDES}, "f") == ImagePart(url=URL, **SIDES), (
            "a size of the part's own is more exact"
        )
    with pytest.raises(RequestError) as caught:
        to_part({"type": "image_url", "image_url": {"url": URL, "detail": "medium"}}, "f")
    assert caught.value.info.field == "f.image_url.detail"


NEUTRAL: tuple[dict[str, Any], ...] = (
    {"cache_control": {"type": "ephemeral"}}, {"video_url": None}, {"x": None}, {"x": ""}, {"x": []},
    {"x": {}},
    {"annotations": [1]}, {"id": 5}, {"format": "image/png"},
    {"prompt_cache_breakpoint": {"mode": "explicit"}},
)  # fmt: skip


@pytest.mark.parametrize("keys", NEUTRAL, ids=str)
def test_what_changes_nothing_is_taken(keys: dict[str, Any]) -> None:
    assert to_part(image(**keys), "f") == ImagePart(url=URL)
    assert to_part({"type": "image_url", "image_url": {"url": URL, **keys}}, "f") == ImagePart(url=URL)
    assert to_part({"type": "text", "text": "a", **keys}, "f") == TextPart("a")


@pytest.mark.parametrize("value", [1, 0, False, True, "x", [None], {"a": 1}, float("nan")], ids=str)
@pytest.mark.parametrize(
    "name", ["max_pixel", "num_frames", "do_resize", "sample", "image", "video", "source"]
)
def test_what_is_not_served_is_refused_by_name(name: str, value: object) -> None:
    places: dict[str, dict[str, Any]] = {
        f"f.{name}": image(**{name: value}),
        f"f.image_url.{name}": {"type": "image_url", "image_url": {"url": URL, name: value}},
        f"f.video_url.{name}": {"type": "video_url", "video_url": {"url": [URL], name: value}},
    }
    for field, part in places.items():
        with pytest.raises(RequestError) as caught:
            to_part(part, "f")
        assert (caught.value.info.status, caught.value.info.field) == (400, field)
        assert name in caught.value.info.message


@pytest.mark.parametrize("name", ["nframes", "fps", "total_pixels", "video_start", "min_frames"])
def test_a_picture_has_no_settings_of_a_video(name: str) -> None:
    for part in (image(**{name: 4}), {"type": "text", "text": "a", name: 4}):
        with pytest.raises(RequestError, match=name) as caught:
            to_part(part, "f")
        assert caught.value.info.field == f"f.{name}"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (
            {"type": "image_url", "image_url": {"url": URL, "max_pixels": 784}, "max_pixels": 1568},
            "image_url.max_pixels",
        ),
        ({"type": "image_url", "image_url": {"url": URL, "uuid": "a"}, "uuid": "b"}, "image_url.uuid"),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "low"}, "detail": "high"},
            "image_url.detail",
        ),
        ({"type": "image", "image": URL, "image_url": URL}, "image_url"),
        ({"type": "image_url", "image_url": 5}, "image_url"),
        ({"type": "image_url", "image_url": [URL]}, "image_url"),
        ({"type": "image_url", "image_url": {"url": ["x"]}}, "image_url"),
        ({"type": "image_url", "image_url": ""}, "image_url"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "video_url", "video_url": [URL, 5]}, "video_url"),
        ({"type": "video_url", "video_url": [URL, ""]}, "video_url"),
        ({"type": "video_url", "video_url": []}, "video_url"),
        ({"type": "video", "video": [URL], "uuid": "u"}, "uuid"),
        ({"type": "image_url", "image_url": URL, "uuid": 5}, "uuid"),
        ({"type": "text"}, "text"),
        ({"type": "text", "text": 5}, "text"),
        ({"type": "input_audio", "input_audio": {}}, "type"),
        ({"type": ["text"], "text": "a"}, "type"),
        ({"text": "a", "image_url": URL}, "type"),
        ({}, "type"),
    ],
    ids=str,
)
def test_parts_that_make_no_sense_name_the_key(part: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_part(part, "f")
    assert (caught.value.info.status, caught.value.info.field) == (400, f"f.{field}")


NO_NUMBERS = ("8", True, [8], float("nan"), float("inf"), 2**63, 2**64, -(2**64), 10**30)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize("name", [*SIZES, *SIDES, *SAMPLING, *RATE])
def test_a_setting_is_a_number_that_fits(name: str, value: object) -> None:
    for part, field in (
        (video(**{name: value}), name),
        ({"video_url": {"url": URL, name: value}}, f"video_url.{name}"),
    ):
        with pytest.raises(RequestError) as caught:
            to_part(part, "f")
        assert caught.value.info.field == f"f.{field}"


def test_counts_are_whole() -> None:
    assert to_part(video(nframes=8.0), "f") == VideoPart(url=URL, nframes=8)
    with pytest.raises(RequestError, match="nframes must be a whole number"):
        to_part(video(nframes=8.5), "f")


def test_fields_are_named_from_the_body_on() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, image(nframes=4)]}]}
    with pytest.raises(RequestError) as caught:
        to_messages(decode_request(json.dumps(body).encode()))
    assert caught.value.info.field == "messages[0].content[1].nframes"


PNG, MP4 = "data:image/png;base64,AA", "data:video/mp4;base64,AA"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "input_text", "text": "a"}, TextPart("a")),
        ({"type": "input_image", "image_url": "http://x/y", "detail": "auto"}, ImagePart(url="http://x/y")),
        ({"type": "file", "file": {"file_data": PNG}}, ImagePart(url=PNG)),
        ({"type": "file", "file": {"file_data": MP4, "filename": "a", "file_id": None}}, VideoPart(url=MP4)),
    ],
)
def test_forms_of_other_clients(part: dict[str, Any], expected: Part) -> None:
    assert to_part(part, "p") == expected


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ({"file_id": "f"}, "p.file.file_data"),
        ({"file_data": "data:application/pdf;base64,AA"}, "p.file.file_data"),
        ({"file_data": "http://x/y.png"}, "p.file.file_data"),
        ({"file_data": PNG, "file_id": "f"}, "p.file.file_id"),
    ],
)
def test_files_that_are_not_served_are_refused_by_name(file: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_part({"type": "file", "file": file}, "p")
    assert caught.value.info.field == field
