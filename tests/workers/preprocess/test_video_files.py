"""Videos of every kind that is served: frames are those of decoding the whole file, to the bit."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.config import PreprocessConfig
from tests.films import FILMS, FPS, Film, pointing_to, turned, with_hole
from tests.videos import read_number
from workers.preprocess import av_video, containers
from workers.preprocess.av_video import AvVideo
from workers.preprocess.bitstream import Kind, look_of
from workers.preprocess.containers import CONTAINERS, HEAD_BYTES, Container, container_of
from workers.preprocess.video import VideoBroken
from workers.preprocess.video_files import open_video

MAX_PIXELS = 10**6
IN_OPEN = 0x20  # inotify(7)
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
    container = container_of(path.read_bytes()[:HEAD_BYTES])
    assert container is not None
    assert container.demuxer == DEMUXERS.get(film.kind, film.kind)
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


def test_a_container_is_added_by_one_entry_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NUT, which is not read, is read then."""
    path = tmp_path / "video"
    path.write_bytes(Film("nut", "mpeg4").encode())
    with pytest.raises(VideoBroken, match="not a video that can be decoded"):
        open_video(str(path), "pyav", MAX_PIXELS)
    nut = Container("nut", lambda head: head.startswith(b"nut/multimedia container\0"))
    monkeypatch.setattr(containers, "CONTAINERS", (*CONTAINERS, nut))
    (frame,) = open_video(str(path), "pyav", MAX_PIXELS).frames([9])
    assert read_number(frame) == 9


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_what_is_not_in_the_table_is_read_by_no_reader(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if reader == "decord":
        pytest.importorskip("decord")
    path = tmp_path / "video"
    path.write_bytes(FILMS["mp4 h264"].encode())
    assert open_video(str(path), reader, MAX_PIXELS).metadata.num_frames > 20
    monkeypatch.setattr(containers, "CONTAINERS", CONTAINERS[1:])
    with pytest.raises(VideoBroken, match="not a video that can be decoded"):
        open_video(str(path), reader, MAX_PIXELS)


FORWARDS = {
    "forwards": (1, 0, 0, 1),
    "half": (-1, 0, 0, -1),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
}
TURNS = {
    **FORWARDS,
    "right": (0, 1, -1, 0),
    "left": (0, -1, 1, 0),
    "transposed": (0, 1, 1, 0),
    "across": (0, -1, -1, 0),
}


@pytest.mark.parametrize("name", TURNS)
def test_frames_stand_and_face_as_they_are_to_be_shown(name: str, tmp_path: Path) -> None:
    """Compared with each pixel put where the file's matrix puts it."""
    a, b, c, d = TURNS[name]
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    film = FILMS["mp4 h264"].encode()
    plain.write_bytes(film)
    changed.write_bytes(turned(a, b, c, d)(film))
    (frame,) = open_video(str(plain), "pyav", MAX_PIXELS).frames([9])
    video = open_video(str(changed), "pyav", MAX_PIXELS)
    (found,) = video.frames([9])
    height, width = frame.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    expected = np.zeros_like(frame, shape=(np.ptp(down) + 1, np.ptp(across) + 1, 3))
    expected[down - down.min(), across - across.min()] = frame
    np.testing.assert_array_equal(found, expected)
    assert (video.metadata.height, video.metadata.width) == expected.shape[:2]


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "video"
    path.write_bytes(FILMS["mp4 h264"].encode())
    with pytest.raises(VideoBroken, match="64 x 48 pixels, the limit is 3000 in all"):
        open_video(str(path), "pyav", 3000)


def test_fewer_frames_than_promised_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long video's packets are trusted; what decodes may be less."""
    monkeypatch.setattr(av_video, "COUNTED_PIXELS", 0)
    path = tmp_path / "video"
    path.write_bytes(emptied(FILMS["mp4 h264, one group"].encode(), 20))
    video = open_video(str(path), "pyav", MAX_PIXELS)
    assert video.metadata.num_frames == 50, "each packet has the shape of a picture"
    expected = decoded_forwards(path, True)
    assert len(expected) < 50
    for number in (3, len(expected) - 1):
        (frame,) = video.frames([number])
        np.testing.assert_array_equal(frame, expected[number])
    with pytest.raises(VideoBroken, match="frame 49 cannot be decoded"):
        list(video.frames([49]))


def emptied(data: bytes, first: int) -> bytes:
    """Slices from a packet on have a header that no decoder takes, in units of the right length."""
    changed = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[first:]:
        at, end = packet.pos, packet.pos + packet.size
        while at < end:
            length = int.from_bytes(changed[at : at + 4], "big")
            if changed[at + 4] & 31 in (1, 5):
                changed[at + 5] |= 0x80
                changed[at + 6 : at + 4 + length] = bytes(length - 2)
            at += 4 + length
    return bytes(changed)


@contextlib.contextmanager
def watched(path: Path) -> Iterator[list[int]]:
    """How often a file is opened meanwhile, by anyone."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, bytes(path), IN_OPEN) >= 0
    opened: list[int] = []
    try:
        yield opened
        with contextlib.suppress(BlockingIOError):
            opened.append(len(os.read(descriptor, 4096)) // 16)
    finally:
        os.close(descriptor)


def test_media_in_another_file_is_not_opened(tmp_path: Path) -> None:
    """QuickTime's external data references: the header here, the pictures in a file of the server."""
    secret, path = tmp_path / "secret", tmp_path / "video"
    secret.write_bytes(FILMS["mov h264"].encode())
    path.write_bytes(pointing_to(secret.read_bytes(), secret))
    with watched(secret) as opened, contextlib.suppress(av.FFmpegError):
        options = {"enable_drefs": "1", "use_absolute_path": "1"}
        av.open(str(path), format="mov", options=options).close()
    assert opened, "FFmpeg would open it"
    with watched(secret) as opened, pytest.raises((VideoBroken, av.FFmpegError)):
        open_video(str(path), "pyav", MAX_PIXELS)
    assert not opened


LISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "hls, relative": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{path}'\nduration 1.2\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 1 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD><BaseURL>file://{path}</BaseURL></MPD>',
    "imf": '<?xml version="1.0"?><AssetMap><Path>{path}</Path></AssetMap>',
}
DISGUISES = {
    "none": b"",
    "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
    "free": b"\0\0\0\x08free",
    "matroska": b"\x1aE\xdf\xa3",
    "avi": b"RIFF\0\0\0\0AVI ",
    "ogg": b"OggS",
    "asf": b"0&\xb2u\x8ef\xcf\x11",
    "mpeg": b"\0\0\1\xba",
    "mpegts": (b"G" + bytes(187)) * 8,
    "flv": b"FLV\1",
    "gif": b"GIF89a",
}


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat"])
def test_lists_of_other_files_are_not_opened(kind: str, disguise: str, ending: str, tmp_path: Path) -> None:
    other = tmp_path / "other.ts"
    other.write_bytes(FILMS["mpegts h264"].encode())
    path = tmp_path / f"video.{ending}"
    path.write_bytes(DISGUISES[disguise] + LISTS[kind].format(path=other, name=other.name).encode())
    with watched(other) as opened, pytest.raises((VideoBroken, av.FFmpegError, OSError)):
        open_video(str(path), "pyav", MAX_PIXELS).metadata  # noqa: B018
    assert not opened


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_what_is_no_container_of_a_known_kind_meets_no_decoder(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "video"
    for data in (b"", b"x", b"GGGG" * 30, b"#EXTM3U\n", b"%PDF-1.7", bytes(20_000), b"RIFF\0\0\0\0WAVE"):
        path.write_bytes(data)
        with pytest.raises(VideoBroken, match="not a video that can be decoded"):
            open_video(str(path), reader, MAX_PIXELS)


def units(*kinds: bytes) -> memoryview:
    return memoryview(b"".join(len(unit).to_bytes(4, "big") + unit for unit in kinds))


AVCC = b"\1\x64\0\x1e\xff\xe1\0"
HVCC = b"\1" + bytes(20) + b"\xff\0"
PACKETS: dict[str, tuple[str, bytes, memoryview, Kind]] = {
    "h264 idr": ("h264", AVCC, units(b"\x09\xf0", b"\x67\0", b"\x68\0", b"\x65\x88"), Kind.ENTRY),
    "h264 two slices": ("h264", AVCC, units(b"\x65\x88", b"\x65\x40"), Kind.ENTRY),
    "h264 recovery point": ("h264", AVCC, units(b"\x06\x06\1", b"\x41\x88"), Kind.PICTURE),
    "h264 two pictures": ("h264", AVCC, units(b"\x41\x88", b"\x41\x88"), Kind.DOUBTFUL),
    "h264 parameters on their way": ("h264", AVCC, units(b"\x68\0", b"\x41\x88"), Kind.DOUBTFUL),
    "h264 no picture": ("h264", AVCC, units(b"\x06\x06\1"), Kind.DOUBTFUL),
    "h264 zeros": ("h264", AVCC, memoryview(bytes(40)), Kind.DOUBTFUL),
    "h264 too short": ("h264", AVCC, units(b"\x65\x88\1\1")[:-2], Kind.DOUBTFUL),
    "hevc idr": ("hevc", HVCC, units(b"\x26\1\x80"), Kind.ENTRY),
    "hevc cra": ("hevc", HVCC, units(b"\x2a\1\x80"), Kind.ENTRY),
    "hevc broken link": ("hevc", HVCC, units(b"\x20\1\x80"), Kind.DOUBTFUL),
    "hevc end of sequence": ("hevc", HVCC, units(b"\2\1\x80", b"\x48\1"), Kind.DOUBTFUL),
    "hevc picture": ("hevc", HVCC, units(b"\2\1\x80", b"\2\1\0"), Kind.PICTURE),
    "vp8 key": ("vp8", b"", memoryview(b"\x10\0\0"), Kind.ENTRY),
    "vp8 picture": ("vp8", b"", memoryview(b"\x11\0\0"), Kind.PICTURE),
    "vp8 hidden": ("vp8", b"", memoryview(b"\1\0\0"), Kind.DOUBTFUL),
    "vp9 key": ("vp9", b"", memoryview(b"\x82\0\0"), Kind.ENTRY),
    "vp9 picture": ("vp9", b"", memoryview(b"\x86\0\0"), Kind.PICTURE),
    "vp9 hidden": ("vp9", b"", memoryview(b"\x84\0\0"), Kind.DOUBTFUL),
    "vp9 hidden with the next": ("vp9", b"", memoryview(b"\x84\0\x86\xc1\2\1\xc1"), Kind.PICTURE),
    "vp9 two shown": ("vp9", b"", memoryview(b"\x86\0\x86\xc1\2\1\xc1"), Kind.DOUBTFUL),
    "av1 key": ("libdav1d", b"", memoryview(b"\x12\0\x0a\1\0\x32\1\x10"), Kind.ENTRY),
    "av1 hidden key": ("libdav1d", b"", memoryview(b"\x12\0\x32\1\0"), Kind.PICTURE),
    "av1 picture": ("libdav1d", b"", memoryview(b"\x12\0\x32\1\x30"), Kind.PICTURE),
    "av1 cut": ("libdav1d", b"", memoryview(b"\x12\0\x32\x09\x30"), Kind.DOUBTFUL),
    "av1 nothing": ("libdav1d", b"", memoryview(b"\x12\0"), Kind.DOUBTFUL),
}


@pytest.mark.parametrize("name", PACKETS)
def test_packets_tell_what_they_are(name: str) -> None:
    codec, extradata, data, kind = PACKETS[name]
    look = look_of(codec, extradata)
    assert look is not None
    assert look(data) is kind


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8", "vp9", "libdav1d"])
def test_any_packet_is_looked_at_without_an_error(codec: str) -> None:
    rng = random.Random(0)
    look = look_of(codec, {"h264": AVCC, "hevc": HVCC}.get(codec))
    assert look is not None
    for _ in range(3000):
        assert isinstance(look(memoryview(rng.randbytes(rng.randint(1, 40)))), Kind)


def test_decord_is_asked_for_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"video_reader 'decord' needs the package decord: install"):
        PreprocessConfig(video_reader="decord")
    assert PreprocessConfig().video_reader == "pyav"
