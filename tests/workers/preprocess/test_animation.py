"""Animated pictures as videos: GIF, WebP and APNG."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.videos import counting_frames, read_number
from workers.preprocess.animation import Animation
from workers.preprocess.video import Video, VideoBroken
from workers.preprocess.video_files import open_video

COUNT = 20
KINDS: dict[str, dict[str, Any]] = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}


def animated(kind: str, durations: Any = 40) -> bytes:
    pictures = [Image.fromarray(frame) for frame in counting_frames(COUNT, (64, 48))]
    out = io.BytesIO()
    options = {
        "save_all": True,
        "append_images": pictures[1:],
        "duration": durations,
        "loop": 0,
        **KINDS[kind],
    }
    pictures[0].save(out, kind, **options)
    return out.getvalue()


def opened(path: Path, data: bytes, max_pixels: int = 10**6) -> Video:
    path.write_bytes(data)
    return open_video(str(path), "pyav", max_pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_asked_for_come(kind: str, tmp_path: Path) -> None:
    """Compared with Pillow's own walk over the whole file."""
    data = animated(kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert [read_number(frame) for frame in expected] == list(range(COUNT)), "the film itself is right"
    video = opened(tmp_path / "video", data)
    assert isinstance(video, Animation)
    metadata = video.metadata
    assert (metadata.num_frames, metadata.height, metadata.width) == (COUNT, 48, 64)
    assert metadata.fps == pytest.approx(25)
    for numbers in ([0], [COUNT - 1], [3, 17, 18], [17, 3], range(0, COUNT, 7)):
        for again in (video, open_video(str(tmp_path / "video"), "pyav", 10**6)):
            for number, frame in zip(numbers, again.frames(numbers), strict=True):
                np.testing.assert_array_equal(frame, expected[number], err_msg=f"frame {number}")
    with pytest.raises(VideoBroken, match=f"frame {COUNT} cannot be decoded"):
        list(video.frames([COUNT]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_that_of_the_durations(kind: str, tmp_path: Path) -> None:
    durations = [100, 500] * (COUNT // 2)
    assert opened(tmp_path / "video", animated(kind, durations)).metadata.fps == pytest.approx(1 / 0.3)


def test_no_duration_is_a_tenth_of_a_second_as_in_browsers(tmp_path: Path) -> None:
    assert opened(tmp_path / "video", animated("GIF", 0)).metadata.fps == pytest.approx(10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_transparent_lies_on_white(kind: str, tmp_path: Path) -> None:
    """What was drawn beneath, black here, is not seen."""
    frames = np.zeros((4, 32, 32, 4), np.uint8)
    for number, frame in enumerate(frames):
        frame[number * 8 : number * 8 + 8, :8] = (200, 0, 0, 255)
    out = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    options = {"save_all": True, "append_images": pictures[1:], "duration": 100, "disposal": 2, **KINDS[kind]}
    pictures[0].save(out, kind, **options)
    video = opened(tmp_path / "video", out.getvalue())
    for number, frame in enumerate(video.frames(range(4))):
        assert tuple(frame[number * 8 + 4, 4]) == (200, 0, 0)
        assert tuple(frame[16, 24]) == (255, 255, 255)


@pytest.mark.parametrize("kind", KINDS)
def test_a_still_picture_is_no_video(kind: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (20, 20)).save(out, kind)
    with pytest.raises(VideoBroken, match="does not move is no video"):
        opened(tmp_path / "video", out.getvalue())


@pytest.mark.parametrize("kind", KINDS)
def test_too_large_animations_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(VideoBroken, match="64 x 48 pixels, the limit is 3000 in all"):
        opened(tmp_path / "video", animated(kind), 3000)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_animations_have_the_frames_that_decode(kind: str, tmp_path: Path) -> None:
    data = animated(kind)
    try:
        video = opened(tmp_path / "video", data[: len(data) // 2])
        num_frames = video.metadata.num_frames
    except (VideoBroken, OSError):
        assert kind == "WEBP", "libwebp takes whole files only"
        return
    assert 0 < num_frames < COUNT
    shown = [read_number(frame) for frame in video.frames(range(num_frames))]
    assert shown[: num_frames - 1] == list(range(num_frames - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_animations_end_in_frames_or_in_an_error(kind: str, tmp_path: Path) -> None:
    data, rng = animated(kind), random.Random(0)
    for _ in range(30):
        broken = bytearray(data)
        for _ in range(20):
            broken[rng.randrange(20, len(broken))] = rng.randrange(256)
        try:
            video = opened(tmp_path / "video", bytes(broken))
            assert video.metadata.num_frames > 0
            list(video.frames(range(video.metadata.num_frames)))
        except (VideoBroken, OSError, SyntaxError, ValueError):
            continue
