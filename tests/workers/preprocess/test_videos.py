"""Videos: sampled as Hugging Face samples them, read in processes that may die, and refused when they are no
videos."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.families import ImageSize
from pipeline.transport.tensors import TensorPool
from pipeline.wire.errors import RequestError
from tests.videos import counting_frames, encode_video, read_number
from workers.preprocess.decord_video import DecordVideo
from workers.preprocess.readers import MediaReaders, ReadLimits
from workers.preprocess.threads import Work, on_behalf_of
from workers.preprocess.video import VideoMetadata
from workers.preprocess.video_files import open_video
from workers.preprocess.videos import VideoFile


def video_file(data: bytes) -> VideoFile:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        return VideoFile(os.dup(file.fileno()), len(data), hashlib.sha256(data).digest())


@pytest.fixture
def pool() -> TensorPool:
    return TensorPool.on_host("preprocess.0", 1, 8 << 20, 16)


@pytest.fixture
async def readers(pool: TensorPool) -> AsyncIterator[MediaReaders]:
    made = MediaReaders(pool.info.memory_fd, 2, ReadLimits(10.0, 20.0, 10**6, 4096), "pyav")
    yield made
    await made.close()


@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is an extra")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "matroska", "codec": "libvpx-vp9"},
        {"g": "250", "bf": "2"},
        {"has_sound": True},
        {"fps": 29.97},
    ],
    ids=str,
)
def test_decord_finds_the_same_frames_in_good_kinds(options: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "video"
    path.write_bytes(encode_video(counting_frames(60), **options))  # type: ignore[arg-type]
    ours, theirs = (open_video(str(path), reader, 10**6) for reader in ("pyav", "decord"))
    assert isinstance(theirs, DecordVideo)
    for video in (ours, theirs):
        fps = pytest.approx(options.get("fps", 24.0), rel=1e-3)
        assert video.metadata == VideoMetadata(60, fps, 120, 160)
        for numbers in ([0, 1, 2], [3, 17, 18, 59], [40, 5], [59], [0], range(0, 60, 7)):
            assert [read_number(frame) for frame in video.frames(numbers)] == list(numbers)


async def test_frames_arrive_as_torch_would_resize_them(readers: MediaReaders, pool: TensorPool) -> None:
    frames = counting_frames(30)
    file = video_file(encode_video(frames, crf="1"))
    metadata = await readers.inspect(file, "")
    assert metadata == VideoMetadata(30, 24.0, 120, 160)
    size, numbers = ImageSize(84, 112), (0, 11, 29)
    await readers.read(file, numbers, size, 4096, "")
    out = pool.memory.array(4096, (3, *size, 3))  # type: ignore[attr-defined]
    decoded = np.stack(list(open_video(file.path, "pyav", 10**6).frames(numbers)))
    source = torch.from_numpy(decoded).permute(0, 3, 1, 2)
    # what torchvision's resize calls
    expected = F.interpolate(source, tuple(size), mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()
    difference = np.abs(out.astype(int) - expected)
    assert difference.max() <= 2
    assert (difference != 0).mean() < 0.02
    assert len(readers._all) == 1, "one process did both"


BROKEN = {
    "empty": b"",
    "text": b"this is no video" * 100,
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "cut": encode_video(counting_frames(20))[:2000],
    "noise": random.Random(0).randbytes(50_000),
}


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile 12\nduration 1.2\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///tmp/x.ts\n#EXT-X-ENDLIST\n",
    ],
)
async def test_a_list_of_other_files_is_not_opened(text: str, readers: MediaReaders) -> None:
    with pytest.raises(RequestError, match="not a video that can be decoded"):
        await readers.inspect(video_file(text.encode()), "")


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_video_is_refused(name: str, readers: MediaReaders) -> None:
    with pytest.raises(RequestError, match="not a video that can be decoded") as refusal:
        await readers.inspect(video_file(BROKEN[name]), "field")
    assert (refusal.value.info.status, refusal.value.info.field) == (400, "field")
    assert await readers.inspect(video_file(encode_video(counting_frames(4))), ""), "the next is served"


async def test_a_video_broken_in_its_middle_ends_in_frames_or_in_an_error(readers: MediaReaders) -> None:
    data = bytearray(encode_video(counting_frames(100), g="10"))
    data[len(data) // 3 : len(data) // 2] = random.Random(1).randbytes(len(data) // 2 - len(data) // 3)
    file = video_file(bytes(data))
    with contextlib.suppress(RequestError):
        metadata = await readers.inspect(file, "")
        await readers.read(file, range(0, metadata.num_frames, 10), ImageSize(28, 28), 0, "")
    assert await readers.inspect(video_file(encode_video(counting_frames(4))), ""), "the next is served"


async def test_too_large_frames_are_refused(readers: MediaReaders) -> None:
    with pytest.raises(RequestError, match="1280 x 800 pixels, the limit is 1000000"):
        await readers.inspect(video_file(encode_video(counting_frames(2, (1280, 800)))), "")


async def test_a_reader_that_dies_or_hangs_costs_its_job_only(readers: MediaReaders) -> None:
    file = video_file(encode_video(counting_frames(10)))
    await readers.inspect(file, "")
    (process,) = readers._all
    os.kill(process.pid, signal.SIGKILL)
    assert (await readers.inspect(file, "")).num_frames == 10, (
        "whoever comes next is not to blame: a fresh one tries again"
    )
    (process,) = readers._all
    os.kill(process.pid, signal.SIGSTOP)
    readers.limits = readers.limits._replace(stall_s=0.5)
    with pytest.raises(RequestError, match=r"stood still for 0\.5 s"):
        await readers.inspect(file, "")
    readers.limits = readers.limits._replace(stall_s=30.0)
    assert (await readers.inspect(file, "")).num_frames == 10
    assert len(readers._all) == 1


async def test_videos_read_side_by_side_keep_to_their_own(readers: MediaReaders, pool: TensorPool) -> None:
    files = [video_file(encode_video(counting_frames(40)[start:])) for start in (0, 10, 20)]
    size = ImageSize(120, 160)
    step = size.height * size.width * 3

    async def read(index: int, frame: int) -> int:
        on_behalf_of.set(Work(f"r{index}", tenant=f"t{index}"))  # no tenant has all processes
        offset = (index * 10 + frame) * step
        await readers.read(files[index], (frame,), size, offset, "")
        return read_number(pool.memory.array(offset, (*size, 3)))  # type: ignore[attr-defined]

    jobs = [(index, frame) for frame in range(10) for index in range(3)]
    assert await asyncio.gather(*(read(*job) for job in jobs)) == [
        index * 10 + frame for index, frame in jobs
    ]
    assert len(readers._all) == 2


async def test_the_file_is_gone_with_the_last_who_holds_it(readers: MediaReaders) -> None:
    file = video_file(encode_video(counting_frames(4)))
    path = file.path
    await readers.inspect(file, "")
    assert os.readlink(path).endswith("(deleted)")
    del file
    with pytest.raises(OSError, match="No such file"):
        os.readlink(path)
