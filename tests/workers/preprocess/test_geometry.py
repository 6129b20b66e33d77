"""Sizes and frames as a part's settings ask for them, compared with qwen-vl-utils' and transformers'
rules."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.families import (
    ImageSize,
    MediaInfo,
    ModelInfo,
    PlacedMedia,
    Placeholders,
    VideoInfo,
    read_model_info,
)
from pipeline.families.qwen2_vl import Qwen2VL
from pipeline.wire.errors import RequestError
from pipeline.wire.generation import Span
from pipeline.wire.prompts import ImagePart, VideoPart
from tests import reference
from tests.pipeline.families.configs import QWEN2_5_VL, QWEN3_VL, read
from workers.preprocess.geometry import (
    check_settings,
    chosen_frames,
    frame_range,
    picture_size,
    video_frame_size,
)
from workers.preprocess.video import VideoMetadata

INFO = read_model_info(EMBEDDED / "model")
FACTOR = 28
VIDEO = VideoInfo(
    fps=2.0, min_frames=4, max_frames=768, min_pixels=128 * FACTOR**2, max_pixels=768 * FACTOR**2,
    max_total_pixels=int(128_000 * FACTOR**2 * 0.9) * 2,
)  # fmt: skip
LARGE = dataclasses.replace(read_model_info(EMBEDDED / "model", 56 * 56, 1280 * FACTOR**2), video=VIDEO)
VISION = LARGE.vision


def qwen_resize(height: int, width: int, low: int, high: float) -> ImageSize:
    """`smart_resize` of transformers, which is qwen-vl-utils'."""
    size = reference.video_processing().smart_resize(
        height, width, factor=FACTOR, min_pixels=low, max_pixels=high
    )
    return ImageSize(*size)


def seen(part: ImagePart, height: int = 600, width: int = 800) -> ImageSize:
    return picture_size(part, ImageSize(height, width), LARGE, "f")


def frames(part: VideoPart, total: int = 300, fps: float = 30.0, most: int = 768) -> list[int]:
    return list(chosen_frames(part, VideoMetadata(total, fps, 600, 800), LARGE, most, "f").numbers)


def frame_size(part: VideoPart, count: int = 16, height: int = 600, width: int = 800) -> ImageSize:
    return video_frame_size(part, ImageSize(height, width), count, LARGE, "f")


def test_a_picture_is_seen_in_the_area_that_is_asked_for() -> None:
    assert seen(ImagePart(max_pixels=100_000)) == qwen_resize(600, 800, 56 * 56, 100_000)
    assert seen(ImagePart(min_pixels=800_000)) == qwen_resize(600, 800, 800_000, VISION.max_pixels)
    both = ImagePart(min_pixels=200_704, max_pixels=200_704)
    assert seen(both) == qwen_resize(600, 800, 200_704, 200_704)


def test_looser_bounds_than_the_servers_are_the_servers() -> None:
    for part in (
        ImagePart(min_pixels=1),
        ImagePart(max_pixels=16384 * 28 * 28),
        ImagePart(max_pixels=2**63 - 1),
    ):
        assert seen(part, 3000, 4000) == seen(ImagePart(), 3000, 4000)
        assert seen(part, 10, 10) == seen(ImagePart(), 10, 10)
    for video in (VideoPart(min_pixels=1), VideoPart(max_pixels=2**63 - 1), VideoPart(total_pixels=2**62)):
        assert frame_size(video, 768, 3000, 4000) == frame_size(VideoPart(), 768, 3000, 4000)
    assert frames(VideoPart(max_frames=10**9), most=64) == frames(VideoPart(max_frames=64))
    assert frames(VideoPart(fps=30.0, min_frames=10**9), most=64) == frames(VideoPart(fps=30.0), most=64)


def test_a_picture_may_be_seen_smaller_than_the_servers_least() -> None:
    assert seen(ImagePart(max_pixels=28 * 28)) == ImageSize(28, 28)


def test_a_size_that_is_asked_for_is_rounded_as_in_qwen_vl_utils() -> None:
    rng = random.Random(3)
    for _ in range(300):
        height, width = rng.randint(28, 900), rng.randint(28, 900)
        part = ImagePart(resized_height=height, resized_width=width, min_pixels=1, max_pixels=28 * 28)
        assert seen(part) == qwen_resize(height, width, 4 * FACTOR**2, VISION.max_pixels), (
            "it goes before the area"
        )
        video = VideoPart(resized_height=height, resized_width=width)
        assert frame_size(video) == qwen_resize(height, width, 4 * FACTOR**2, VIDEO.max_pixels)
    assert seen(ImagePart(resized_height=280, resized_width=420)) == ImageSize(280, 420)
    assert seen(ImagePart(resized_height=1, resized_width=30)).height >= 28
    large = seen(ImagePart(resized_height=10**6, resized_width=10**6))
    assert large.height * large.width <= VISION.max_pixels


def test_frames_share_the_total_as_in_qwen_vl_utils() -> None:
    rng = random.Random(4)
    for _ in range(300):
        count, total = rng.choice([2, 16, 64, 768]), rng.choice([1, 10**6, 20_480 * 28 * 28])
        low, most = rng.choice([128, 256]) * FACTOR**2, rng.choice([300, 768]) * FACTOR**2
        limit = max(min(768 * FACTOR**2, total * 2 // count), int(low * 1.05))
        expected = qwen_resize(700, 900, min(low, limit, most), min(most, limit))
        part = VideoPart(total_pixels=total, min_pixels=low, max_pixels=most)
        assert frame_size(part, count, 700, 900) == expected


def smart_nframes(part: VideoPart, total: int, fps: float) -> int:
    """qwen-vl-utils' rule, by its description."""
    if part.nframes is not None:
        return round(part.nframes / 2) * 2
    low = math.ceil((part.min_frames or 4) / 2) * 2
    high = math.floor((part.max_frames or min(768, total)) / 2) * 2
    wanted = min(min(max(total / fps * (part.fps or 2.0), low), high), total)
    return math.floor(wanted / 2) * 2


def test_as_many_frames_as_in_qwen_vl_utils() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        total, rate = rng.randint(8, 3000), rng.choice([5, 23.976, 25, 30, 60])
        options: dict[str, Any] = rng.choice(
            [
                {"nframes": rng.randint(2, min(768, total) // 2 * 2)},
                {"fps": rng.choice([0.1, 1.0, 2.0, 7.5, 240.0])},
                {"fps": 1.0, "min_frames": rng.randint(1, 40)},
                {"max_frames": rng.randint(40, 768), "min_frames": rng.randint(1, 40)},
            ]
        )
        part = VideoPart(**options)
        made = frames(part, total, rate)
        assert abs(len(made) - smart_nframes(part, total, rate)) <= ("nframes" not in options), (
            options,
            total,
            rate,
        )
        assert made == sorted(made)
        assert 0 <= made[0] <= made[-1] < total
        if part.nframes is not None:
            assert made == [index * total // len(made) for index in range(len(made))]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, (0, 300)),
        ({"video_start": 0.0}, (0, 300)),
        ({"video_start": 2.0}, (60, 300)),
        ({"video_end": 2.0}, (0, 61)),
        ({"video_start": 1.01, "video_end": 1.99}, (31, 60)),
        ({"video_start": 5, "video_end": 10**6}, (150, 300)),
    ],
)
def test_a_window_of_time(window: dict[str, float], expected: tuple[int, int]) -> None:
    """As `calculate_video_frame_range`: the first frame is rounded up, the last, which is in it, down."""
    part = VideoPart(nframes=4, **window)
    assert frame_range(part, VideoMetadata(300, 30.0, 1, 1), "f") == expected
    made = frames(part)
    assert made[0] == expected[0]
    assert expected[0] <= made[-1] < expected[1]
    assert len(made) == 4
    short = frames(VideoPart(fps=30.0, **window))
    assert abs(len(short) - (expected[1] - expected[0])) <= 1
    assert short[0] == expected[0]


@pytest.mark.parametrize("window", [{"video_start": 10.0}, {"video_start": 9.99}, {"video_end": 0.01}])
def test_a_window_without_frames_is_refused(window: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="no two frames") as caught:
        frames(VideoPart(**window))
    assert caught.value.info.field == f"f.{next(iter(window))}"


@pytest.mark.parametrize("count", [303, 700, 10**18])
def test_more_frames_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(RequestError, match="nframes must be between 2 and 300"):
        frames(VideoPart(nframes=count))
    with pytest.raises(RequestError, match="nframes must be between 2 and 8"):
        frames(VideoPart(nframes=16), most=8)
    with pytest.raises(RequestError, match="nframes must be between"):
        frames(VideoPart(nframes=1))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_pixels": 0}, {"max_pixels": -1}, {"min_pixels": 0}, {"min_pixels": 10**9},
        {"resized_height": 28},
        {"resized_width": 28}, {"resized_height": 0, "resized_width": 5},
        {"resized_width": -1, "resized_height": 5},
        {"resized_height": 2**63, "resized_width": 2**63}, {"resized_height": 28, "resized_width": 28 * 201},
        {"min_pixels": 20_000, "max_pixels": 10_000},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [ImagePart, VideoPart])
def test_sizes_that_make_no_sense_are_named(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        check_settings(kind(url="x", **settings), INFO, 768, "f")
    named = caught.value.info.field.removeprefix("f.")
    assert named in settings or named in ("resized_height", "resized_width")


@pytest.mark.parametrize(
    "settings",
    [
        {"fps": 0.0}, {"fps": -1.0}, {"fps": NAN}, {"fps": INF}, {"nframes": 0}, {"nframes": -4},
        {"fps": 1.0, "nframes": 4},
        {"min_frames": 0}, {"max_frames": 1}, {"max_frames": 0}, {"max_frames": -2},
        {"min_frames": 9, "max_frames": 4},
        {"total_pixels": 0}, {"total_pixels": -5}, {"video_start": -1.0}, {"video_end": NAN},
        {"video_start": INF},
        {"video_start": 3.0, "video_end": 3.0}, {"video_start": 3.0, "video_end": 1.0}, {"video_end": -0.5},
    ],
    ids=str,
)  # fmt: skip
def test_frames_that_make_no_sense_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        check_settings(VideoPart(url="x", **settings), INFO, 768, "f")
    assert caught.value.info.field.removeprefix("f.") in settings


@pytest.mark.parametrize(
    "settings",
    [
        {"fps": 2.0},
        {"nframes": 2},
        {"video_start": 1.0},
        {"video_end": 1.0},
        {"max_frames": 2},
        {"min_frames": 4},
    ],
    ids=str,
)
def test_a_list_of_frames_is_seen_whole_or_refused(settings: dict[str, Any]) -> None:
    three = (ImagePart(url="a"),) * 3
    check_settings(VideoPart(frames=three, max_frames=4, min_frames=2, max_pixels=20_000), INFO, 768, "f")
    with pytest.raises(RequestError):
        check_settings(VideoPart(frames=three, **settings), INFO, 768, "f")
    with pytest.raises(RequestError, match="those of the video"):
        check_settings(
            VideoPart(frames=(ImagePart(url="a", resized_height=28, resized_width=28),)), INFO, 768, "f"
        )


class TimedFamily(Qwen2VL):
    has_frame_times = True


def test_a_list_of_frames_has_a_rate_where_the_family_sees_it() -> None:
    timed = dataclasses.replace(INFO, family=TimedFamily())
    three = (ImagePart(url="a"),) * 3
    check_settings(VideoPart(frames=three, fps=2.0), timed, 768, "f")
    check_settings(VideoPart(frames=three, timestamps=(0.0, 0.5, 70.0)), timed, 768, "f")
    with pytest.raises(RequestError, match="timestamps does not apply"):
        check_settings(VideoPart(frames=three, timestamps=(0.0, 0.5, 70.0)), INFO, 768, "f")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"fps": 0.0}, "fps must be above 0"),
        ({"fps": 1e-9}, "lasts at most"),
        ({"nframes": 2}, "nframes does not apply"),
        ({"video_end": 1.0}, "video_end does not apply"),
        ({"timestamps": (0.0, 1.0)}, "2 timestamps for 3 frames"),
        ({"timestamps": ()}, "0 timestamps for 3 frames"),
        ({"timestamps": (0.0, 1.0, 1.0)}, "after the one before"),
        ({"timestamps": (2.0, 1.0, 3.0)}, "after the one before"),
        ({"timestamps": (-1.0, 1.0, 3.0)}, "between 0 and"),
        ({"timestamps": (0.0, 1.0, INF)}, "between 0 and"),
        ({"timestamps": (0.0, NAN, 2.0)}, "between 0 and"),
        ({"timestamps": (0.0, 1.0, 1e10)}, "lasts at most"),
        ({"timestamps": (0.0, 1.0, 2.0), "fps": 1.0}, "exclude each other"),
    ],
    ids=str,
)
def test_senseless_times_of_frames_are_refused(settings: dict[str, Any], what: str) -> None:
    timed = dataclasses.replace(INFO, family=TimedFamily())
    with pytest.raises(RequestError, match=what):
        check_settings(VideoPart(frames=(ImagePart(url="a"),) * 3, **settings), timed, 768, "f")


def test_timestamps_are_those_of_a_list_of_frames() -> None:
    timed = dataclasses.replace(INFO, family=TimedFamily())
    with pytest.raises(RequestError, match="of a list of frames"):
        check_settings(VideoPart(url="x", timestamps=(0.0, 1.0)), timed, 768, "f")


def test_what_the_family_refuses_is_refused_by_its_field(tmp_path: Path) -> None:
    info = read(tmp_path, QWEN3_VL)
    for part in (VideoPart(url="x"), VideoPart(url="x", resized_height=64, resized_width=64)):
        with pytest.raises(RequestError, match="at least 2 frames") as caught:
            video_frame_size(part, ImageSize(60, 80), 1, info, "f")
        assert caught.value.info.field == "f"


@pytest.fixture(scope="module")
def infos(tmp_path_factory: pytest.TempPathFactory) -> list[ModelInfo]:
    folder = tmp_path_factory.mktemp("models")
    return [INFO, read(folder / "qwen2_5_vl", QWEN2_5_VL), read(folder / "qwen3_vl", QWEN3_VL)]


@pytest.mark.parametrize("seed", range(300))
def test_any_number_is_a_size_or_a_refusal(seed: int, infos: list[ModelInfo]) -> None:
    info = infos[seed % 3]
    rng = random.Random(seed)
    ints = (None, None, None, 0, 1, 2, 28, 784, 12_544, 10**6, 2**31, 2**63 - 1, 2**64 - 1, -1, -(2**63))
    reals = (None, None, None, 0.0, -0.0, 1e-308, 0.1, 1.0, 9.9, 30.0, 1e9, 1e308, NAN, INF, -INF)
    names = (
        "min_pixels",
        "max_pixels",
        "resized_height",
        "resized_width",
        "total_pixels",
        "nframes",
        "min_frames",
        "max_frames",
    )
    settings: dict[str, Any] = {name: rng.choice(ints) for name in names}
    settings |= {name: rng.choice(reals) for name in ("fps", "video_start", "video_end")}
    keep = rng.sample(sorted(settings), rng.randint(1, 4))
    part = VideoPart(url="x", **{name: settings[name] for name in keep})
    metadata = VideoMetadata(rng.choice([1, 2, 3, 300, 10**6]), rng.choice([0.01, 30.0, 1e6]), 600, 800)
    with contextlib.suppress(RequestError):
        check_settings(part, info, 64, "f")
        seen = chosen_frames(part, metadata, info, 64, "f")
        made = seen.numbers
        assert 1 <= len(made) <= 66
        assert 0 <= made[0] <= made[-1] < metadata.num_frames
        size = video_frame_size(part, ImageSize(600, 800), len(made), info, "f")
        assert size.height % info.vision.factor == size.width % info.vision.factor == 0
        assert 0 < size.height * size.width < 10 * info.video.max_pixels
        media = MediaInfo(info.vision.grid_of(size, len(made)), seen)
        segments = info.family.segments(media, info)
        spans: list[Span] = []
        for segment in segments:
            if isinstance(segment, Placeholders):
                spans.append(Span(spans[-1].stop if spans else 0, segment.num_tokens))
        placed = [PlacedMedia(media, tuple(spans))]
        positions, _ = info.family.positions(spans[-1].stop, placed, info)
        assert (np.diff(positions[0]) >= 0).all()
