"""Cores that the LLM and the ViTs lend each other: while one role is idle, the other computes on all cores.

A file in the run directory, mapped by all, has one byte for each process: idle, busy on its own cores, or
busy on all cores. A process that begins to work waits until no process of the other role computes on its
cores, which takes at most a decode step, or a layer of a ViT.
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
MAX_WAIT_S = 0.3  # for cores; during a longer step or layer both roles compute on them
# the other role must be idle for so long before its cores are taken: pauses between steps are shorter
HOLD_S = 0.1


class Activity:
    """The mapped file: a byte for each LLM rank, then one for each ViT."""

    def __init__(self, run_dir: Path) -> None:
        fd = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, 2 * MAX_WORKERS)
            self._map = mmap.mmap(fd, 2 * MAX_WORKERS)
        finally:
            os.close(fd)

    def announce(self, worker: WorkerId, state: int) -> None:
        self._map[_start(worker.role) + worker.rank] = state

    def busiest(self, role: Role) -> int:
        """The highest state of the workers of a role."""
        return max(self._map[_start(role) : _start(role) + MAX_WORKERS])


def _start(role: Role) -> int:
    return MAX_WORKERS if role is Role.VIT else 0


class CoreSharing:
    """The cores of one process. Its compute thread calls `enter` before a piece of work, and may call `adapt`
    in the middle of it."""

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
        self._idle_since: float | None = None  # of the other role
        self.is_wide = self._is_busy = False
        self.announce(False)  # the predecessor may have died while busy

    @property
    def can_widen(self) -> bool:
        return bool(self._placement.wide_cores)

    def announce(self, is_busy: bool) -> None:
        """The other role takes no cores of a busy process: to be called as soon as work is expected."""
        self._is_busy = is_busy
        self._activity.announce(self._worker, (WIDE if self.is_wide else OWN) if is_busy else IDLE)

    def enter(self) -> bool:
        """Announces work, adapts, and waits while the other role computes on all cores. Returns `is_wide`."""
        self.adapt()
        self.announce(True)
        deadline = self._clock() + MAX_WAIT_S
        while self._activity.busiest(self._other) == WIDE and self._clock() < deadline:
            self.adapt()  # if both roles took all cores at once, both return to their own
            self._sleep(POLL_S)
        return self.is_wide

    def adapt(self) -> bool:
        """Takes the other role's cores if it is idle, else returns to its own. Returns `is_wide`."""
        if not self.can_widen:
            return False
        now = self._clock()
        if self._activity.busiest(self._other) != IDLE:
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
    """Every thread of this process: `sched_setaffinity(0, …)` would leave a library's threads where they
    are."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
