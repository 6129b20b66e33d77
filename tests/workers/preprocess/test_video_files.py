"""Videos of every kind that is served: frames are those of decoding the whole file, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from tests.films import FILMS, FPS, with_hole
from tests.videos import read_number
from workers.preprocess import av_video
from workers.preprocess.av_video import AvVideo
from workers.preprocess.containers import HEAD_BYTES, demuxer_of
from workers.preprocess.video import VideoBroken
from workers.preprocess.video_files import open_video

MAX_PIXELS = 10**6
DEMUXERS = {"mp4": "mov", "webm": "matroska"}  # where the demuxer is not called as the muxer is


@functools.cache
def encoded(name: str) -> bytes:
    try:
        return FILMS[name].encode()
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV cannot encode {FILMS[name].codec}")


def decoded_forwards(path: Path, is_damaged: bool) -> list[np.ndarray]:
    """All frames of the first stream that is no cover picture.

    With several threads FFmpeg conceals no damage: there it shows whatever memory held.
    """
    pictures: list[np.ndarray] = []
    with av.open(str(path)) as container:
        cover = av.stream.Disposition.attached_pic
        stream = next(stream for stream in container.streams.video if not stream.disposition & cover)
        if is_damaged:
            stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                found = packet.decode()
            except av.error.InvalidDataError:
                continue  # as players do
            pictures += [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in found]
    return pictures


def requests(count: int) -> list[Sequence[int]]:
    last = count - 1
    spread = sorted({3 % count, 17 % count, 18 % count, last})
    return [[0], [last], spread, [last * 4 // 5, last // 8], range(0, count, 7), range(count), [last // 2]]


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("counted_pixels", [0, 1 << 25], ids=["indexed", "counted"])
def test_the_frames_asked_for_come(
    name: str,
    counted_pixels: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With small videos' packets trusted as those of long ones, and not."""
    monkeypatch.setattr(av_video, "COUNTED_PIXELS", counted_pixels)
    film = FILMS[name]
    path = tmp_path / "a video"
    path.write_bytes(encoded(name))
    assert demuxer_of(path.read_bytes()[:HEAD_BYTES]) == DEMUXERS.get(film.kind, film.kind)
    expected = decoded_forwards(path, film.change is with_hole)
    if film.num_shown is not None:
        shown = [read_number(frame) for frame in expected]
        assert shown == list(range(film.num_shown)), "the film itself is right"
    assert len(expected) > 20
    video = open_video(str(path), "pyav", MAX_PIXELS)
    assert isinstance(video, AvVideo)
    if counted_pixels == 0:
        assert (video._index is not None) == film.is_indexed
    metadata = video.metadata
    assert (metadata.num_frames, metadata.height, metadata.width) == (len(expected), *expected[0].shape[:2])
    if film.times is None and film.num_shown is not None:
        assert metadata.fps == pytest.approx(FPS, rel=0.1)
    for numbers in requests(len(expected)):
        for again in (video, open_video(str(path), "pyav", MAX_PIXELS)):
            for number, frame in zip(numbers, again.frames(numbers), strict=True):
                what = f"{name}: frame {number} of {list(numbers)}"
                np.testing.assert_array_equal(frame, expected[number], err_msg=what)
    if counted_pixels == 0:
        assert (video._index is not None) == film.is_indexed, "its packets told the truth"
    with pytest.raises(VideoBroken, match=f"frame {len(expected)} cannot be decoded"):
        list(video.frames([len(expected)]))
