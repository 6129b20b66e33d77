"""Cores that the LLM and the ViTs lend each other: who computes alone has all of them, and gives them back as
soon as the other begins.

Each process has one byte of a file in the run directory, mapped by all, that says whether it computes, and on
whose cores. Nobody is ever asked or told. Who begins waits until the others have their hands off its cores,
which takes them a step, or a layer.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.process.process import Placement
from pipeline.wire.topology import Role, WorkerId

FILE = "activity"
MAX_WORKERS = 256  # of a role
IDLE, OWN, WIDE = 0, 1, 2
POLL_S = 0.001
MOST_TO_WAIT_S = 0.3  # for cores; a step or a layer may take longer, and then both share them for a while
# others have been idle for so long before their cores are taken: they often only wait for the next piece of
# work
HOLD_S = 0.1


class Activity:
    """Who computes, and where: a byte for each LLM rank, then one for each ViT."""

    def __init__(self, run_dir: Path) -> None:
        fd = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, 2 * MAX_WORKERS)
            self._map = mmap.mmap(fd, 2 * MAX_WORKERS)
        finally:
            os.close(fd)

    def announce(self, worker: WorkerId, state: int) -> None:
        self._map[_start(worker.role) + worker.rank] = state

    def most(self, role: Role) -> int:
        """The state of whoever of a role is busiest."""
        return max(self._map[_start(role) : _start(role) + MAX_WORKERS])


def _start(role: Role) -> int:
    return MAX_WORKERS if role is Role.VIT else 0


class CoreSharing:
    """One compute process's view.

    The thread that computes calls `enter` before a piece of work, and may call `adapt` in its middle.
    """

    def __init__(
        self, activity: Activity, worker: WorkerId, placement: Placement,
        set_num_threads: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic, set_cores: Callable[[Sequence[int]], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._activity, self._worker, self._placement = activity, worker, placement
        self._set_num_threads, self._clock, self._sleep, self._set_cores = (
            set_num_threads,
            clock,
            sleep,
            set_cores or pin_all_threads,
        )
        self._other = Role.LLM if worker.role is Role.VIT else Role.VIT
        self._idle_since: float | None = None  # the others
        self.is_wide = self._is_busy = False
        self.announce(False)  # whoever was here before may have died at work

    @property
    def can_widen(self) -> bool:
        return bool(self._placement.wide_cores)

    def announce(self, is_busy: bool) -> None:
        """Others keep off our cores while we are busy: to be told as soon as work is in sight."""
        self._is_busy = is_busy
        self._activity.announce(self._worker, (WIDE if self.is_wide else OWN) if is_busy else IDLE)

    def enter(self) -> bool:
        """Announces work, adapts, and waits while others still compute on our cores.

        Whether theirs are ours now.
        """
        self.adapt()
        self.announce(True)
        deadline = self._clock() + MOST_TO_WAIT_S
        while self._activity.most(self._other) == WIDE and self._clock() < deadline:
            self.adapt()  # should both have taken all at once, both give back
            self._sleep(POLL_S)
        return self.is_wide

    def adapt(self) -> bool:
        """Takes the others' cores or gives them back. Whether they are ours now."""
        if not self.can_widen:
            return False
        now = self._clock()
        if self._activity.most(self._other) != IDLE:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        self.widen(self._idle_since is not None and now - self._idle_since >= HOLD_S)
        return self.is_wide

    def widen(self, is_wide: bool) -> None:
        if is_wide == self.is_wide:
            return
        self.is_wide = is_wide
        place = self._placement
        self._set_cores(place.wide_cores if is_wide else place.cores)
        self._set_num_threads(len(place.wide_cores) if is_wide else place.num_threads)
        self.announce(self._is_busy)


def pin_all_threads(cores: Sequence[int]) -> None:
    """Of this process: threads that a library started earlier keep the cores that they were born with."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
