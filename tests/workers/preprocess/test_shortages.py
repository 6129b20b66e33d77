"""What this machine lacks is a 503 that says so; what others do wrong stays theirs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest
import uvloop
from PIL import Image

from pipeline.config import PreprocessConfig
from pipeline.transport.tensors import TensorPool
from pipeline.wire.errors import RequestError
from pipeline.wire.generation import GenerateRequest, RequestRefused
from pipeline.wire.prompts import ChatMessage, VideoPart
from tests.pictures import encode, scene
from tests.videos import CLIP
from tests.workers.preprocess.hosts import host, reply
from tests.workers.preprocess.name_servers import name_server
from tests.workers.preprocess.test_preprocessor import Rig, make_rig
from tests.workers.preprocess.test_readers import LIMITS, SIZE
from tests.workers.preprocess.test_videos import video_file
from workers.preprocess import reader_process
from workers.preprocess.fetch import Fetcher
from workers.preprocess.media import PictureSource
from workers.preprocess.reader_process import Failed, Reader, VideoJob
from workers.preprocess.readers import MediaReaders
from workers.preprocess.shortages import NO_ROOM, refusal_of

REFUSED = "http://127.0.0.1:9/"  # nobody listens there


@contextlib.contextmanager
def no_descriptors(spare: int = 0) -> Iterator[None]:
    """This process can open `spare` more and no other."""
    next_free = os.dup(0)
    os.close(next_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def full_disk() -> IO[bytes]:
    return open("/dev/full", "w+b")


async def error_of(work: Awaitable[object]) -> tuple[int, str, str]:
    with pytest.raises(RequestError) as refused:
        await work
    return refused.value.info.status, refused.value.info.message, refused.value.info.field


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Preprocess runs on uvloop, which has errors of its own."""

    def run_test(test: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            await test()

        with asyncio.Runner(
            loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None
        ) as runner:
            runner.run(main())

    return run_test


@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN],
)
def test_which_errors_are_this_machines(number: int) -> None:
    theirs = RequestError("theirs", field="f")
    assert refusal_of(OSError(number, ""), theirs).info == RequestError(NO_ROOM, field="f", status=503).info
    assert refusal_of(MemoryError(), theirs).info.status == 503
    assert refusal_of(RuntimeError("can't start new thread"), theirs).info.status == 503
    assert refusal_of(RuntimeError("the transport is closed"), theirs) is theirs
    for other in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ETIMEDOUT, None):
        assert refusal_of(OSError(other, ""), theirs) is theirs


def test_a_download_without_a_descriptor_is_not_the_hosts_fault(run: Callable[..., None]) -> None:
    """Neither for its connection nor for its name: c-ares only says that it reached no server."""

    async def test() -> None:
        tempfile.gettempdir()
        async with name_server({}) as names:
            fetcher = Fetcher(PreprocessConfig(allow_private_media=True), [names.address])
            proxied = Fetcher(PreprocessConfig(allow_private_media=True, media_proxy=REFUSED[:-1]))
            for fetch in (fetcher.fetch, fetcher.fetch_file):
                for url in (REFUSED, "http://no.test/"):
                    assert await error_of(fetch(url, "f")) == (400, "the media's host cannot be reached", "f")
                    with no_descriptors():
                        assert await error_of(fetch(url, "f")) == (503, NO_ROOM, "f"), url
            assert (await error_of(proxied.fetch(REFUSED, "f")))[0] == 502
            with no_descriptors():
                assert await error_of(proxied.fetch(REFUSED, "f")) == (503, NO_ROOM, "f")
            await proxied.close()
            await fetcher.close()

    run(test)


async def test_a_full_disk_is_not_the_hosts_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(bytes(3 << 20)))

    async with host(answer) as served:
        fetcher = Fetcher(PreprocessConfig(allow_private_media=True))
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", full_disk)
            assert await error_of(fetcher.fetch_file(f"{served.base}/", "f")) == (503, NO_ROOM, "f")
        fetched = await fetcher.fetch_file(f"{served.base}/", "f")
        assert fetched.data is not None
        assert fetched.data.nbytes == 3 << 20
        await fetcher.close()


async def test_a_local_file_without_a_descriptor(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(b"video")
    fetcher = Fetcher(PreprocessConfig(allowed_local_media_path=str(tmp_path)))
    assert (await fetcher.fetch_file(str(tmp_path / "video"), "f")).data is not None
    for spare in (0, 1):
        with no_descriptors(spare):
            assert await error_of(fetcher.fetch_file(str(tmp_path / "video"), "f")) == (503, NO_ROOM, "f")
    assert (await error_of(fetcher.fetch_file(str(tmp_path / "absent"), "f")))[0] == 400


# Readers.


def test_a_reader_that_cannot_be_started(run: Callable[..., None]) -> None:
    """However many descriptors are left: none is lost, and the next request finds them."""

    async def test() -> None:
        pool = TensorPool.on_host("preprocess.0", 1, 8 << 20, 16)
        readers = MediaReaders(pool.info.memory_fd, 1, LIMITS, "pyav")
        process = await asyncio.create_subprocess_exec("true")  # what the loop needs for the first is there
        await process.wait()
        before = len(os.listdir("/proc/self/fd"))
        for spare in range(8):
            with no_descriptors(spare):
                assert await error_of(readers.inspect_picture(encode(scene(1)), "f")) == (503, NO_ROOM, "f")
            assert len(os.listdir("/proc/self/fd")) <= before, "none is leaked"
        assert await readers.inspect_picture(encode(scene(1)), "f") == (112, 112)
        await readers.close()
        assert readers.is_idle
        pool.close()

    run(test)


@pytest.fixture
def pool() -> TensorPool:
    return TensorPool.on_host("preprocess.0", 1, 8 << 20, 16)


async def test_an_inbox_without_memory(pool: TensorPool, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = MediaReaders(pool.info.memory_fd, 1, LIMITS, "pyav")

    def write(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    for failing in (write, lambda fd, data, offset: len(data) // 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing)
            assert await error_of(readers.inspect_picture(encode(scene(1)), "f")) == (503, NO_ROOM, "f")
        assert readers._all == set()
    assert await readers.inspect_picture(encode(scene(1)), "f") == (112, 112)
    await readers.close()


def data_bytes(pid: int) -> int:
    """What counts for RLIMIT_DATA."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


async def test_a_reader_to_which_the_machine_gives_no_memory(pool: TensorPool) -> None:
    """It may have 2048 MiB and gets 50: that is not the picture's fault, as it is where it has no more than
    that."""
    readers = MediaReaders(pool.info.memory_fd, 1, LIMITS, "pyav")
    colours = encode(Image.new("RGB", (7000, 7000)))
    file = video_file(CLIP.data)
    await readers.inspect(file, "")
    (process,) = readers._all
    mapped = data_bytes(process.pid)
    _, most = resource.prlimit(process.pid, resource.RLIMIT_DATA)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (mapped + (50 << 20), most))
    assert await error_of(readers.read_picture(colours, SIZE, 0, "f")) == (503, NO_ROOM, "f")
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (most, most))
    await readers.read_picture(colours, SIZE, 0, "f")
    assert {one.pid for one in readers._all} == {process.pid}
    await readers.close()


# Requests.


def refusal(rig: Rig, request_id: str) -> tuple[int, str, str]:
    (refused,) = rig.llm.take(RequestRefused)
    rig.end(request_id)
    rig.check_nothing_left()
    return refused.error.status, refused.error.message, refused.error.field


async def test_a_video_sent_along_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_rig(1) as rig:
        monkeypatch.setattr(tempfile, "TemporaryFile", full_disk)
        rig.submit("r", [CLIP.data], messages=(ChatMessage("user", (VideoPart(frame=0),)),))
        await rig.settle()
        assert refusal(rig, "r") == (503, NO_ROOM, "messages[0].content[0].video_url")


async def test_no_memory_ends_its_request_with_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    async def decode(*args: Any) -> None:
        raise MemoryError

    async with make_rig(1) as rig:
        build, rig.core.prompts.builder.build = rig.core.prompts.builder.build, fail  # type: ignore[method-assign,assignment]
        rig.submit("prepare")
        await rig.settle()
        assert refusal(rig, "prepare") == (503, NO_ROOM, "messages")
        rig.core.prompts.builder.build = build  # type: ignore[method-assign]
        monkeypatch.setattr(PictureSource, "decode", decode)
        rig.submit("decode", [encode(scene(1))])
        await rig.settle()
        assert refusal(rig, "decode") == (503, NO_ROOM, "messages")


async def test_no_thread_ends_its_request_with_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the processes and threads of a user or container are limited."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with make_rig(1) as rig:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            rig.submit("r")
            await rig.settle()
        assert refusal(rig, "r") == (503, NO_ROOM, "messages")
        rig.submit("s")
        await rig.settle()
        assert len(rig.llm.take(GenerateRequest)) == 1
        rig.end("s")
        rig.check_nothing_left()


async def test_a_file_that_is_to_be_read_again_later_is_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg says so of broken files; a client that is told to come again would, for ever."""

    def open_video(*args: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(reader_process, "open_video", open_video)
    reader = Reader(cast(Any, None), -1, 1, "pyav")
    assert reader.handle(VideoJob("x", True, 1.0, 1)) == Failed()
