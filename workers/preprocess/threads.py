"""The threads that tokenize texts and hash media. Their requests are in the flight recorder meanwhile, in
case one ends the process; a quarantined request has all threads for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pipeline.process.flight_recorder import Executing, FlightRecorder
from workers.preprocess.places import Asker, Places

P = ParamSpec("P")
R = TypeVar("R")


class Work(NamedTuple):
    request_id: str
    is_alone: bool = False
    tenant: str = ""

    @property
    def asker(self) -> Asker:
        return Asker(self.tenant, self.request_id)


NOBODYS = Work("")
on_behalf_of: ContextVar[Work] = ContextVar("on_behalf_of", default=NOBODYS)  # the request of a task


class _Turns:
    """Any number at once, or one alone. Work that runs alone goes before later work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = self._num_alone = 0  # `_num_alone`: inside or waiting

    @contextlib.contextmanager
    def take(self, is_alone: bool) -> Iterator[None]:
        with self._changed:
            if is_alone:
                self._num_alone += 1
                self._changed.wait_for(lambda: not self._num_inside)
            else:
                self._changed.wait_for(lambda: not self._num_alone)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._num_alone -= is_alone
                self._changed.notify_all()


class Recording:
    """The requests that run in all threads of the process, for the flight recorder's one list."""

    def __init__(self, recorder: FlightRecorder) -> None:
        self._executing, self._lock = Executing(recorder), threading.Lock()
        self._starts: dict[object, float] = {}
        self.turns = _Turns()

    @contextlib.contextmanager
    def running(self, work: Work) -> Iterator[None]:
        token: Any = object()
        with self._lock:
            self._executing.begin(work.request_id)
            self._starts[token] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._executing.end(work.request_id)
                del self._starts[token]

    def longest_s(self, now: float) -> float:
        """The seconds that the oldest piece of work has been running."""
        with self._lock:
            return now - min(self._starts.values(), default=now)


class RecordedThreads(ThreadPoolExecutor):
    """Tasks set `on_behalf_of` before they submit work."""

    def __init__(self, num_threads: int, recording: Recording, name: str) -> None:
        super().__init__(num_threads, name)
        self._recording = recording

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        work = on_behalf_of.get()

        def run() -> R:
            with self._recording.turns.take(work.is_alone), self._recording.running(work):
                return function(*args, **kwargs)

        return super().submit(run)


class FairThreads:
    """Threads that tenants share, so that long work of one tenant does not delay the others."""

    def __init__(self, num_threads: int, recording: Recording, name: str) -> None:
        self._threads = RecordedThreads(num_threads, recording, name)
        self._places = Places(num_threads)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the function in a thread, once it is the turn of the calling task's request."""
        async with self._places.take(on_behalf_of.get().asker):
            future = asyncio.wrap_future(self._threads.submit(function, *args, **kwargs))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                # a thread cannot be cancelled: its place is free when it has ended
                await asyncio.wait([future])
                if not future.cancelled():
                    future.exception()  # nobody waits for it: asyncio would log a client's mistake
                raise

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
