"""Films for tests: every container that is served, with the codecs common in it, and odd files.

Frames tell their number (`tests/videos.py`) and are small, so that all are encoded within seconds.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.videos import Frames, counting_frames

NUM_FRAMES = 50
FPS = 25
# elsewhere aac
SOUND = {"webm": "libopus", "avi": "mp2", "mpegts": "mp2", "mpeg": "mp2", "asf": "wmav2", "ogg": "libopus"}
X265 = "log-level=none:keyint=12:min-keyint=12:bframes=3:pools=1:frame-threads=1"


@functools.cache
def frames() -> Frames:
    return counting_frames(NUM_FRAMES, (64, 48))


@dataclass(frozen=True)
class Film:
    kind: str  # FFmpeg's name of the muxer
    codec: str
    options: dict[str, str] = field(default_factory=dict)  # of the encoder
    muxer: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    has_sound: bool = False
    has_cover: bool = False  # a picture as the first stream
    has_second: bool = False  # the same film backwards as a second stream
    times: Sequence[int] | None = None  # of the frames, in units of 1/100 s
    is_indexed: bool = False  # its packets alone tell all
    num_shown: int | None = NUM_FRAMES  # None: what decodes of it, decodes
    change: Callable[[bytes], bytes] = bytes  # of the file

    def encode(self) -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            self._write(file.name)
            return self.change(Path(file.name).read_bytes())

    def _write(self, path: str) -> None:
        with av.open(path, "w", format=self.kind, options=self.muxer) as container:
            cover = self._add(container, "mjpeg", "yuvj420p", {}) if self.has_cover else None
            if cover is not None:
                cover.disposition = av.stream.Disposition.attached_pic
            count = 1 + self.has_second
            streams = [self._add(container, self.codec, self.pix_fmt, self.options) for _ in range(count)]
            sound = container.add_stream(SOUND.get(self.kind, "aac"), rate=48000) if self.has_sound else None
            if cover is not None:
                container.mux(cover.encode(video_frame(frames()[::-1][0], 0)))
                container.mux(cover.encode())
            packets = []
            for stream, pictures in zip(streams, (frames(), frames()[::-1]), strict=False):
                for number, picture in enumerate(pictures):
                    time = number if self.times is None else self.times[number]
                    packets += stream.encode(video_frame(picture, time, FPS if self.times is None else 100))
                packets += stream.encode()
            if sound is not None:
                packets += _silence(sound)
            for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
                container.mux(packet)

    def _add(self, container: Any, codec: str, pix_fmt: str, options: dict[str, str]) -> Any:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width = frames().shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, FPS if self.times is None else 100)
        stream.codec_context.thread_count = 1
        return stream


def video_frame(picture: Any, time: int, units: int = FPS) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame.pts, frame.time_base = time, Fraction(1, units)
    return frame


def _silence(stream: Any) -> list[Any]:
    seconds = NUM_FRAMES // FPS
    stream.layout = "mono"
    stream.bit_rate = 64000
    samples = np.zeros((1, 48000 * seconds), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 48000
    frame.pts, frame.time_base = 0, Fraction(1, 48000)
    return [*stream.encode(frame), *stream.encode()]


def without_first_packets(count: int, kind: str) -> Callable[[bytes], bytes]:
    """A clip as editors cut it without encoding anew: it begins in the middle of a group of pictures."""

    def change(data: bytes) -> bytes:
        out = io.BytesIO()
        with av.open(io.BytesIO(data)) as source, av.open(out, "w", format=kind) as target:
            stream = source.streams.video[0]
            copy = target.add_stream_from_template(stream)
            for number, packet in enumerate(source.demux(stream)):
                if number >= count and packet.size:
                    packet.stream = copy
                    target.mux(packet)
        return out.getvalue()

    return change


def without_first_bytes(share: float, unit: int) -> Callable[[bytes], bytes]:
    return lambda data: data[int(len(data) * share) // unit * unit :]


def with_hole(data: bytes) -> bytes:
    """A fifth of its middle is zeros, as of an unfinished download."""
    start, end = len(data) * 2 // 5, len(data) * 3 // 5
    return data[:start] + bytes(end - start) + data[end:]


def trimmed(data: bytes) -> bytes:
    """An edit list that leaves out the first seven frames."""
    at = data.index(b"elst")
    version, count = data[at + 4], struct.unpack(">I", data[at + 8 : at + 12])[0]
    assert (version, count) == (0, 1)
    duration, start = struct.unpack(">Ii", data[at + 12 : at + 20])
    ticks = timescale(data) // FPS
    entry = struct.pack(">Ii", duration - 7 * 1000 // FPS, start + 7 * ticks)
    return data[: at + 12] + entry + data[at + 20 :]


def timescale(data: bytes) -> int:
    at = data.index(b"mdhd")
    return int(struct.unpack(">I", data[at + 16 : at + 20])[0])


def turned(a: int, b: int, c: int, d: int) -> Callable[[bytes], bytes]:
    """Shown by a matrix: x' = a x + c y, y' = b x + d y."""

    def change(data: bytes) -> bytes:
        at = data.index(b"tkhd") + 44
        one = 1 << 16
        matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
        return data[:at] + matrix + data[at + 36 :]

    return change


def pointing_to(data: bytes, target: Path) -> bytes:
    """A mov without media: by QuickTime's alias record they lie in another file."""
    path = str(target).replace("/", ":").encode()
    path += bytes(len(path) % 2)
    record = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + bytes(4) + bytes(16)
    record += struct.pack(">HH", 2, len(path)) + path + struct.pack(">hH", -1, 0)
    record += bytes(max(0, 150 - len(record)))
    entry = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    moov = data.index(b"moov") - 4
    header = data[moov:]
    for match in reversed(list(re.finditer(b"dref", header))):
        header = _with_entry(header, match.end() + 8, entry)
    media = data.index(b"mdat") + 4
    return data[:media] + bytes(moov - media) + header


def _with_entry(header: bytes, at: int, entry: bytes) -> bytes:
    """Another data reference at an offset of the header; the boxes around it grow."""
    old = int.from_bytes(header[at : at + 4], "big")
    changed = bytearray(header[:at] + entry + header[at + old :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        box = header.rindex(name, 0, at) - 4
        size = int.from_bytes(header[box : box + 4], "big") + len(entry) - old
        changed[box : box + 4] = size.to_bytes(4, "big")
    return bytes(changed)


H264 = {"g": "12", "bf": "3", "preset": "ultrafast", "sc_threshold": "0"}
B_FRAMES = {**H264, "preset": "veryfast"}
OPEN_GOP = {**B_FRAMES, "x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0:b-adapt=0"}
REFRESH = {"g": "12", "x264-params": "intra-refresh=1:keyint=12:bframes=0"}
HEVC = {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=1"}
HEVC_CLOSED = {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=0"}
AV1 = {"preset": "12", "g": "12", "svtav1-params": "lp=1"}
VP8 = {"g": "12", "deadline": "realtime", "cpu-used": "8", "b": "300k"}
VP9 = {**VP8, "lag-in-frames": "0"}
ALT_REF = {**VP8, "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4"}
PARTS = {"g": "12", "bf": "2", "b": "600k"}
PLAIN = {"g": "12", "b": "600k"}
UNEVEN = [4 * number + (number % 3) + 20 * (number // 10) for number in range(NUM_FRAMES)]

FILMS: dict[str, Film] = {
    "mp4 h264": Film("mp4", "libx264", B_FRAMES, is_indexed=True),
    "mov h264": Film("mov", "libx264", B_FRAMES, is_indexed=True, has_sound=True),
    "mp4 h264, one group": Film("mp4", "libx264", {**B_FRAMES, "g": "250"}, is_indexed=True),
    "mp4 h264, index in front": Film("mp4", "libx264", B_FRAMES, {"movflags": "faststart"}, is_indexed=True),
    "mp4 h264, open groups": Film("mp4", "libx264", OPEN_GOP, is_indexed=True),
    "mp4 h264, intra refresh": Film("mp4", "libx264", REFRESH, is_indexed=True),
    "mp4 h264, interlaced": Film("mp4", "libx264", {**B_FRAMES, "flags": "+ildct+ilme"}),
    "mp4 h264, fragmented": Film(
        "mp4",
        "libx264",
        B_FRAMES,
        {"movflags": "frag_keyframe+empty_moov"},
        is_indexed=True,
    ),
    "mp4 h264, fragmented with sound": Film(
        "mp4",
        "libx264",
        B_FRAMES,
        {"movflags": "frag_keyframe+empty_moov+default_base_moof"},
        has_sound=True,
        is_indexed=True,
    ),
    "mp4 h264, uneven times": Film("mp4", "libx264", B_FRAMES, times=UNEVEN, is_indexed=True),
    "mp4 h264, cover first": Film("mp4", "libx264", B_FRAMES, has_cover=True, is_indexed=True),
    "mp4 h264, two streams": Film(
        "mp4",
        "libx264",
        B_FRAMES,
        has_second=True,
        has_sound=True,
        is_indexed=True,
    ),
    "mp4 h264, edit list": Film("mp4", "libx264", B_FRAMES, change=trimmed, num_shown=None),
    "mp4 h264, turned": Film(
        "mp4",
        "libx264",
        B_FRAMES,
        change=turned(0, 1, -1, 0),
        is_indexed=True,
        num_shown=None,
    ),
    "mp4 h264, cut": Film("mp4", "libx264", B_FRAMES, change=without_first_packets(5, "mp4"), num_shown=None),
    "mp4 h264, with a hole": Film("mp4", "libx264", B_FRAMES, change=with_hole, num_shown=None),
    "mp4 h264, lossless 4:4:4": Film(
        "mp4",
        "libx264",
        {**B_FRAMES, "qp": "0"},
        pix_fmt="yuv444p",
        is_indexed=True,
    ),
    "mp4 hevc, open groups": Film("mp4", "libx265", HEVC, is_indexed=True),
    "mp4 hevc, closed groups": Film("mp4", "libx265", HEVC_CLOSED, is_indexed=True, has_sound=True),
    "mp4 hevc, cut": Film("mp4", "libx265", HEVC, change=without_first_packets(5, "mp4"), num_shown=None),
    "mp4 hevc, cut at a later group": Film(
        "mp4",
        "libx265",
        HEVC,
        change=without_first_packets(12, "mp4"),
        num_shown=None,
        is_indexed=True,
    ),
    "mp4 mpeg4": Film("mp4", "mpeg4", PARTS),
    "mp4 av1": Film("mp4", "libsvtav1", AV1, is_indexed=True),
    "mp4 vp9": Film("mp4", "libvpx-vp9", VP9, is_indexed=True),
    "mov mjpeg": Film("mov", "mjpeg", {}, pix_fmt="yuvj420p"),
    "mov prores": Film("mov", "prores_ks", {}, pix_fmt="yuv422p10le"),
    "matroska h264": Film("matroska", "libx264", B_FRAMES, is_indexed=True, has_sound=True),
    "matroska h264, open groups": Film("matroska", "libx264", OPEN_GOP, is_indexed=True),
    "matroska h264, uneven times": Film("matroska", "libx264", B_FRAMES, times=UNEVEN, is_indexed=True),
    "matroska h264, two streams": Film("matroska", "libx264", B_FRAMES, has_second=True, is_indexed=True),
    "matroska h264, cut": Film(
        "matroska",
        "libx264",
        OPEN_GOP,
        change=without_first_packets(5, "matroska"),
        num_shown=None,
    ),
    "matroska hevc, open groups": Film("matroska", "libx265", HEVC, is_indexed=True),
    "matroska mpeg2": Film("matroska", "mpeg2video", PARTS),
    "matroska ffv1": Film("matroska", "ffv1", {"g": "12"}),
    "webm vp8": Film("webm", "libvpx", VP8, is_indexed=True, has_sound=True),
    "webm vp9": Film("webm", "libvpx-vp9", VP9, is_indexed=True),
    "webm vp9, hidden frames": Film("webm", "libvpx-vp9", ALT_REF, is_indexed=True, has_sound=True),
    "webm vp9, cut": Film("webm", "libvpx-vp9", VP9, change=without_first_packets(5, "webm"), num_shown=None),
    "webm av1": Film("webm", "libsvtav1", AV1, is_indexed=True),
    "webm vp8, live": Film("webm", "libvpx", VP8, {"live": "1"}, is_indexed=True),
    "webm vp9, live": Film("webm", "libvpx-vp9", VP9, {"live": "1"}, has_sound=True, is_indexed=True),
    "avi h264": Film("avi", "libx264", B_FRAMES, has_sound=True),
    "avi mpeg4": Film("avi", "mpeg4", PARTS),
    "avi mpeg4 with sound": Film("avi", "mpeg4", PARTS, has_sound=True),
    "avi msmpeg4": Film("avi", "msmpeg4", {"g": "1", "b": "3M"}),
    "avi mjpeg": Film("avi", "mjpeg", {}, pix_fmt="yuvj420p", has_sound=True),
    "mpegts h264": Film("mpegts", "libx264", B_FRAMES),
    "mpegts h264 with sound": Film("mpegts", "libx264", B_FRAMES, has_sound=True),
    "mpegts h264, open groups": Film("mpegts", "libx264", OPEN_GOP),
    "mpegts h264, cut": Film(
        "mpegts",
        "libx264",
        B_FRAMES,
        change=without_first_bytes(0.3, 188),
        num_shown=None,
    ),
    "mpegts h264, cut anywhere": Film(
        "mpegts",
        "libx264",
        B_FRAMES,
        change=lambda data: data[1000:],
        num_shown=None,
    ),
    "mpegts h264, with a hole": Film("mpegts", "libx264", B_FRAMES, change=with_hole, num_shown=None),
    "mpegts hevc": Film("mpegts", "libx265", HEVC),
    "mpegts mpeg2": Film("mpegts", "mpeg2video", PARTS, has_sound=True),
    "mpegts mpeg2, interlaced": Film("mpegts", "mpeg2video", {**PARTS, "flags": "+ildct+ilme"}),
    "m2ts h264": Film("mpegts", "libx264", B_FRAMES, {"mpegts_m2ts_mode": "1"}, has_sound=True),
    "m2ts h264, cut": Film(
        "mpegts",
        "libx264",
        B_FRAMES,
        {"mpegts_m2ts_mode": "1"},
        change=without_first_bytes(0.3, 192),
        num_shown=None,
    ),
    "mpeg mpeg2": Film("mpeg", "mpeg2video", PARTS),
    "mpeg mpeg2 with sound": Film("mpeg", "mpeg2video", PARTS, has_sound=True),
    "mpeg mpeg1": Film("mpeg", "mpeg1video", PARTS),
    "flv h264": Film("flv", "libx264", B_FRAMES, has_sound=True),
    "flv flv1": Film("flv", "flv", PLAIN),
    "asf mpeg4": Film("asf", "mpeg4", PARTS),
    "asf wmv2": Film("asf", "wmv2", PLAIN, has_sound=True),
    "asf wmv1": Film("asf", "wmv1", PLAIN),
    "ogg vp8": Film("ogg", "libvpx", VP8, has_sound=True),
    "ogg theora": Film("ogg", "libtheora", PLAIN),
}
