"""How long a video takes to be read: PyAV, the reader of the server, beside decord (`vlm-pipeline[decord]`).

    python -m tools.bench_video                                    # makes an H.264 mp4 of four minutes
    python -m tools.bench_video --file clip.mp4 --frames 16 64 --rounds 5

One round opens the file, tells what it is and reads so many frames, evenly spread: with the one reader, then
with the other, in one process. Medians are told: shared machines drift.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from pipeline.families.qwen2_vl import sample_frames
from workers.preprocess.video_files import open_video

MAX_PIXELS = 64_000_000
READERS = ("pyav", "decord")


def make_film(path: Path, seconds: int, gop: int, width: int, height: int, fps: int = 25) -> None:
    """Noise and shapes that move, encoded with B-frames."""
    noise = np.random.default_rng(0).integers(0, 255, (2 * height, 2 * width, 3), np.uint8)
    with av.open(str(path), "w", format="mp4") as container:
        options = {"g": str(gop), "preset": "veryfast", "crf": "28"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * fps):
            y, x = (number // 2) % height, number % width
            picture = noise[y : y + height, x : x + width] // 4
            picture[height // 3 : height // 2, x // 2 : x // 2 + width // 4] += 128
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_seconds(path: Path, reader: str, num_frames: int) -> float:
    start = time.perf_counter()
    video = open_video(str(path), reader, MAX_PIXELS)
    metadata = video.metadata
    numbers = sample_frames(metadata.num_frames, metadata.fps, 1000.0, num_frames, num_frames, 2)
    for frame in video.frames(numbers):
        assert frame.ndim == 3
    return time.perf_counter() - start


def measure(path: Path, num_frames: int, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {reader: [] for reader in READERS}
    for _ in range(rounds):
        for reader in READERS:
            times[reader].append(read_seconds(path, reader, num_frames))
    return times


def report(path: Path, frames: Sequence[int], rounds: int) -> None:
    video = open_video(str(path), "pyav", MAX_PIXELS)
    metadata, mib = video.metadata, path.stat().st_size / 2**20
    print(f"{metadata.num_frames} frames of {metadata.width} x {metadata.height}, {mib:.1f} MiB")
    print("| frames read | PyAV, s | decord, s | ratio |\n| --- | --- | --- | --- |")
    for num_frames in frames:
        times = measure(path, num_frames, rounds)
        ours, theirs = (statistics.median(times[reader]) for reader in READERS)
        print(f"| {num_frames} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--file", type=Path, help="a video instead of a made one")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=240, help="length of the made video")
    parser.add_argument("--gop", type=int, default=250, help="frames between key frames; phones: 30")
    parser.add_argument("--size", type=int, nargs=2, default=[640, 360], metavar=("WIDTH", "HEIGHT"))
    options = parser.parse_args()
    if options.file:
        report(options.file, options.frames, options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        make_film(path, options.seconds, options.gop, *options.size)
        report(path, options.frames, options.rounds)


if __name__ == "__main__":
    main()
