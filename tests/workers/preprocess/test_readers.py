"""The processes that read media: what takes too long or too much ends in its own request's error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
from PIL import Image

from pipeline.families import ImageSize
from pipeline.transport.tensors import TensorPool
from pipeline.wire.errors import RequestError
from tests.pictures import encode, noise, scene
from tests.videos import counting_frames, encode_video
from tests.workers.preprocess.test_videos import video_file
from workers.preprocess.images import decode
from workers.preprocess.readers import MediaReaders, ReadLimits
from workers.preprocess.shortages import NO_ROOM
from workers.preprocess.threads import Work, on_behalf_of

SIZE = ImageSize(84, 112)
LIMITS = ReadLimits(10.0, 20.0, 64_000_000, 2048)
# 64 million pixels in 62 KiB: a second or more of processor time, 250 MiB and more of memory.
SLOW = encode(Image.new("L", (8000, 8000)))


@pytest.fixture
def pool() -> TensorPool:
    return TensorPool.on_host("preprocess.0", 1, 8 << 20, 16)


@pytest.fixture
async def readers(pool: TensorPool) -> AsyncIterator[MediaReaders]:
    made = MediaReaders(pool.info.memory_fd, 3, LIMITS, "pyav")
    yield made
    await made.close()
    assert made._all == set()
    assert made.is_idle


def pids(readers: MediaReaders) -> set[int]:
    return {process.pid for process in readers._all}


def is_there(pid: int) -> bool:
    """Also while nobody has reaped it."""
    return os.path.exists(f"/proc/{pid}")


async def started(readers: MediaReaders, count: int = 1) -> set[int]:
    """Processes that have done a job, so that none is about to start."""
    names = [f"r{number}" for number in range(count)]
    await asyncio.gather(*(as_request(name, readers.inspect_picture(SLOW, "")) for name in names))
    return pids(readers)


async def as_request(request_id: str, work: object, tenant: str | None = None) -> object:
    """On behalf of a request, of a tenant of its own where none is named."""
    on_behalf_of.set(Work(request_id, tenant=request_id if tenant is None else tenant))
    return await work  # type: ignore[misc]


async def test_pixels_arrive_in_the_pool_as_decoded_here(readers: MediaReaders, pool: TensorPool) -> None:
    for number, data in enumerate((encode(scene(1)), encode(noise(1, (900, 700))), encode(scene(2), "JPEG"))):
        found = await readers.inspect_picture(memoryview(data), "")
        assert found == ((700, 900) if number == 1 else (112, 112))
        await readers.read_picture(data, SIZE, 4096 * number, "")
        out = pool.memory.array(4096 * number, (*SIZE, 3))  # type: ignore[attr-defined]
        assert np.array_equal(out, decode(data, SIZE, ""))
    assert len(readers._all) == 1, "one process did all of it"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF"])
async def test_every_kind_is_read_within_the_limits_of_a_process(
    kind: str,
    readers: MediaReaders,
    pool: TensorPool,
) -> None:
    data = encode(noise(1, (1500, 1100)), kind)
    assert await readers.inspect_picture(data, "") == (1100, 1500)
    await readers.read_picture(data, SIZE, 0, "")
    out = pool.memory.array(0, (*SIZE, 3))  # type: ignore[attr-defined]
    assert np.array_equal(out, decode(data, SIZE, ""))


async def test_what_is_decoded_has_the_limit_of_what_was_looked_at(readers: MediaReaders) -> None:
    """They need not be the same: a client may name one picture and send another."""
    readers.limits = LIMITS._replace(max_pixels=63_999_999)
    with pytest.raises(RequestError, match="8000 x 8000 pixels, the limit is 63999999"):
        await readers.read_picture(SLOW, SIZE, 0, "")


async def test_a_picture_may_be_larger_than_what_is_written_at_once(readers: MediaReaders) -> None:
    data = encode(noise(3, (1600, 1200)), "BMP")
    assert len(data) > 5 << 20
    assert await readers.inspect_picture(data, "") == (1200, 1600)
    assert readers._idle[0].inbox_bytes() == 0, "a large one's memory is given back"


async def test_what_is_no_picture_is_refused_and_names_its_field(readers: MediaReaders) -> None:
    with pytest.raises(RequestError, match="not a picture") as refusal:
        await readers.inspect_picture(b"this is no picture", "field")
    assert (refusal.value.info.status, refusal.value.info.field) == (400, "field")
    with pytest.raises(RequestError, match="the picture cannot be decoded"):
        await readers.read_picture(encode(noise(3, (200, 200)))[:2000], SIZE, 0, "")
    assert len(readers._all) == 1, "and the process goes on"


async def test_too_much_processor_time_ends_in_a_refusal_and_others_go_on(readers: MediaReaders) -> None:
    await started(readers, 3)
    readers.limits = LIMITS._replace(picture_cpu_s=0.3)
    start = time.monotonic()
    reads = {name: readers.read_picture(SLOW, SIZE, 0, "f") for name in ("bad", "worse")}
    slow = [asyncio.create_task(as_request(name, read)) for name, read in reads.items()]
    await asyncio.sleep(0.05)
    readers.limits = LIMITS
    quick = asyncio.create_task(as_request("good", readers.read_picture(encode(scene(1)), SIZE, 65536, "")))
    await quick
    assert not any(task.done() for task in slow), "the quick one did not wait for them"
    for task in slow:
        with pytest.raises(RequestError, match=r"takes more than 0\.3 s of processor time") as refusal:
            await task
        assert (refusal.value.info.status, refusal.value.info.field) == (400, "f")
    assert time.monotonic() - start < 20
    assert len(readers._all) == 1, "the other two are gone, and are not missed before the next"


async def test_many_requests_of_a_tenant_leave_a_process_to_others(readers: MediaReaders) -> None:
    await started(readers, 3)
    reads = {f"slow {number}": readers.read_picture(SLOW, SIZE, 0, "f") for number in range(5)}
    slow = [asyncio.create_task(as_request(name, read, "greedy")) for name, read in reads.items()]
    await asyncio.sleep(0.05)
    await as_request("quick", readers.read_picture(encode(scene(1)), SIZE, 65536, ""), "other")
    assert not any(task.done() for task in slow), "before, three of them held all three processes"
    await asyncio.gather(*slow)


async def test_a_video_has_a_limit_of_its_own(readers: MediaReaders) -> None:
    file = video_file(encode_video(counting_frames(300, (320, 240))))
    await readers.inspect(file, "")
    readers.limits = LIMITS._replace(video_cpu_s=0.01)
    with pytest.raises(RequestError, match=r"the video takes more than 0\.01 s of processor time"):
        await readers.read(file, range(0, 300, 10), SIZE, 0, "")
    readers.limits = LIMITS
    assert (await readers.inspect(file, "")).num_frames == 300


async def test_a_busy_machine_refuses_nobody(readers: MediaReaders) -> None:
    """Time in which a process does not compute is not its own."""
    (pid,) = await started(readers)
    readers.limits = LIMITS._replace(picture_cpu_s=1.0)
    os.kill(pid, signal.SIGSTOP)
    reading = asyncio.create_task(readers.read_picture(encode(scene(1)), SIZE, 0, ""))
    await asyncio.sleep(1.5)
    assert not reading.done()
    os.kill(pid, signal.SIGCONT)
    await reading
    assert pids(readers) == {pid}


async def test_one_that_stands_still_is_killed(readers: MediaReaders) -> None:
    (pid,) = await started(readers)
    os.kill(pid, signal.SIGSTOP)
    readers.limits = LIMITS._replace(stall_s=0.5)
    with pytest.raises(RequestError, match=r"its decoder stood still for 0\.5 s"):
        await readers.read_picture(encode(scene(1)), SIZE, 0, "")
    assert not is_there(pid)


async def test_too_much_memory_ends_in_a_refusal(pool: TensorPool) -> None:
    readers = MediaReaders(pool.info.memory_fd, 2, LIMITS._replace(memory_mib=100), "pyav")
    (pid,) = await started(readers)
    colours = encode(Image.new("RGB", (7000, 7000)))
    with pytest.raises(RequestError, match="the picture takes more than the 100 MiB of memory") as refusal:
        await readers.read_picture(colours, SIZE, 0, "")
    assert refusal.value.info.status == 400
    await readers.read_picture(encode(scene(1)), SIZE, 0, "")
    assert pids(readers) == {pid}
    await readers.close()


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGSEGV, 400, "the picture cannot be decoded"),  # as a decoder ends by itself
        (signal.SIGABRT, 400, "the picture cannot be decoded"),
        (signal.SIGKILL, 503, NO_ROOM),  # by the kernel, for lack of memory: before, a 400, too
    ],
)
async def test_a_death_is_tried_again_once_and_is_then_the_requests(
    number: int, status: int, message: str, readers: MediaReaders
) -> None:
    (pid,) = await started(readers)
    os.kill(pid, number)
    await readers.read_picture(encode(scene(1)), SIZE, 0, "")  # whoever comes next is not to blame
    (second,) = pids(readers)
    assert second != pid
    killed = 0

    async def kill_all() -> None:
        nonlocal killed
        while True:
            for process in list(readers._all):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
                    killed += 1
            await asyncio.sleep(0.01)

    killer = asyncio.create_task(kill_all())
    with pytest.raises(RequestError, match=message) as refusal:
        await readers.read_picture(SLOW, SIZE, 0, "f")
    killer.cancel()
    assert (refusal.value.info.status, refusal.value.info.field) == (status, "f")
    assert killed >= 2


async def test_a_process_is_reaped_before_its_place_is_anothers(pool: TensorPool) -> None:
    """Whoever waited may be gone: a request that ends, or the n-th attempt at the same."""
    readers = MediaReaders(pool.info.memory_fd, 1, LIMITS, "pyav")
    (pid,) = await started(readers)
    reading = asyncio.create_task(readers.read_picture(SLOW, SIZE, 0, ""))
    await asyncio.sleep(0.2)
    waiting = asyncio.create_task(readers.read_picture(encode(scene(1)), SIZE, 0, ""))
    await asyncio.sleep(0)
    seen: list[int] = []
    original = readers._start

    async def start() -> object:
        seen.append(sum(map(is_there, [pid])))
        return await original()

    readers._start = start  # type: ignore[method-assign,assignment]
    for _ in range(3):
        reading.cancel()
        await asyncio.sleep(0)
    await waiting
    assert seen == [0]
    assert reading.cancelled()
    assert len(readers._all) == 1
    await readers.close()
    assert not any(map(is_there, pids(readers)))


async def test_a_look_at_a_picture_is_finished_though_nobody_waits(readers: MediaReaders) -> None:
    """A broken picture among many ends its request, and no process has to be started anew for that."""
    (pid,) = await started(readers)
    os.kill(pid, signal.SIGSTOP)
    looking = asyncio.create_task(readers.inspect_picture(encode(scene(1)), ""))
    await asyncio.sleep(0.1)
    looking.cancel()
    os.kill(pid, signal.SIGCONT)
    await readers.read_picture(encode(scene(1)), SIZE, 0, "")
    while not readers.is_idle:
        await asyncio.sleep(0.01)
    assert pid in pids(readers)
