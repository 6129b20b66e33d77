"""Who executes in preprocess, and who does so alone."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from pathlib import Path

from pipeline.process.flight_recorder import FlightRecorder, digest_of
from tests.fakes import PREPROCESS
from workers.preprocess.threads import FairThreads, RecordedThreads, Recording, Work, on_behalf_of


async def test_work_is_recorded_while_it_runs_and_not_while_it_waits(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, PREPROCESS)
    recording = Recording(recorder)
    threads = RecordedThreads(1, recording, "text")
    go, loop = threading.Event(), asyncio.get_running_loop()

    def submit(name: str) -> asyncio.Future[bool]:
        on_behalf_of.set(Work(name))
        return loop.run_in_executor(threads, go.wait, 5)

    futures = [contextvars.copy_context().run(submit, name) for name in ("first", "second")]
    await asyncio.sleep(0.1)
    assert recorder.executing() == (digest_of("first"),)
    assert recording.longest_s(time.monotonic()) > 0.05
    go.set()
    await asyncio.gather(*futures)
    assert recorder.executing() == ()
    assert recording.longest_s(time.monotonic()) == 0
    threads.shutdown()


async def test_a_suspect_has_all_threads_for_itself(tmp_path: Path) -> None:
    threads = RecordedThreads(4, Recording(FlightRecorder(tmp_path, PREPROCESS)), "text")
    inside: set[str] = set()
    seen: list[tuple[str, set[str]]] = []
    lock, loop = threading.Lock(), asyncio.get_running_loop()

    def work(name: str) -> None:
        with lock:
            inside.add(name)
            seen.append((name, set(inside)))
        time.sleep(0.05)
        with lock:
            inside.discard(name)

    def submit(name: str, is_alone: bool) -> asyncio.Future[None]:
        on_behalf_of.set(Work(name, is_alone))
        return loop.run_in_executor(threads, work, name)

    names = ["a", "b", "suspect", "c", "d", "suspect too", "e"]
    await asyncio.gather(
        *(contextvars.copy_context().run(submit, name, name.startswith("suspect")) for name in names)
    )
    assert sorted(name for name, _ in seen) == sorted(names)
    for name, others in seen:
        if name.startswith("suspect"):
            assert others == {name}
        else:
            assert not any(other.startswith("suspect") for other in others)
    assert max(len(others) for _, others in seen) > 1, "others run side by side"
    threads.shutdown()


async def test_work_that_fails_for_nobody_is_no_error_of_ours(tmp_path: Path) -> None:
    threads = FairThreads(1, Recording(FlightRecorder(tmp_path, PREPROCESS)), "text")
    begun, go, told = threading.Event(), threading.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    def fail() -> None:
        begun.set()
        go.wait(5)
        raise ValueError

    on_behalf_of.set(Work("a"))
    task = asyncio.create_task(threads.run(fail))
    await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    await asyncio.wait([task])
    assert task.cancelled()
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert told == []
    threads.close()
