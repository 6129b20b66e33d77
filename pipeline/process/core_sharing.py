"""Cores that the LLM and the ViTs lend each other: while one role is idle, the other computes on all cores.

A file in the run directory, mapped by all, has one byte for each process: its state. While both roles have
work, there are two ways, as the placement says:

- Each computes on its own cores. A process that begins to work waits until no process of the other role
  computes on its cores, which takes at most a decode step, or a layer of a ViT.
- They take turns on all cores, where the LLM's own cores would be too few to read its weights as fast as all
  do. After a step the LLM lends the cores for as long as its streams can bear; the ViTs compute in short
  blocks until then, and pause. While the LLM is idle, the cores are lent without an end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.process.bell import Bell
from pipeline.process.process import Placement
from pipeline.wire.topology import Role, WorkerId

FILE = "activity"
MAX_WORKERS = 256  # of a role
# PAUSED: has work, and computes nothing until its turn. OWN and WIDE: computes, on its own cores or on all.
IDLE, PAUSED, OWN, WIDE = 0, 1, 2, 3
POLL_S = 0.001
TURN_POLL_S = 0.0001  # between two looks whether the ViTs have ended their blocks
PAUSE_S = 0.1  # between two looks whether a turn has begun, of which a bell tells
MAX_WAIT_S = 0.3  # for cores; during a longer step or layer both roles compute on them
# the other role must be idle for so long before its cores are taken: pauses between steps are shorter
HOLD_S = 0.1
_LENT = struct.Struct("=d")


class Activity:
    """The mapped file: a byte for each LLM rank, one for each ViT; then until when the cores are lent."""

    def __init__(self, run_dir: Path) -> None:
        size = 2 * MAX_WORKERS + _LENT.size
        fd = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._run_dir, self._bells = run_dir, dict[WorkerId, Bell]()

    def announce(self, worker: WorkerId, state: int) -> None:
        self._map[_start(worker.role) + worker.rank] = state

    def busiest(self, role: Role) -> int:
        """The highest state of the workers of a role."""
        return max(self._map[_start(role) : _start(role) + MAX_WORKERS])

    def bell(self, worker: WorkerId) -> Bell:
        """Rings when a turn of that worker may have begun."""
        if (bell := self._bells.get(worker)) is None:
            bell = self._bells[worker] = Bell(self._run_dir / f"{FILE}.{worker}")
        return bell

    def wake_paused(self, role: Role) -> None:
        states = self._map[_start(role) : _start(role) + MAX_WORKERS]
        rank = states.find(PAUSED)
        while rank >= 0:
            self.bell(WorkerId(role, rank)).ring()
            rank = states.find(PAUSED, rank + 1)

    @property
    def lent_until(self) -> float:
        """Time at which the LLM wants the cores back, by the clock of `time.monotonic`."""
        (end,) = _LENT.unpack_from(self._map, 2 * MAX_WORKERS)
        return float(end)

    @lent_until.setter
    def lent_until(self, end: float) -> None:
        _LENT.pack_into(self._map, 2 * MAX_WORKERS, end)


def _start(role: Role) -> int:
    return MAX_WORKERS if role is Role.VIT else 0


class CoreSharing:
    """The cores of one process. Its compute thread calls `enter` before a piece of work and `leave` behind
    it, and may call `adapt` in the middle of it."""

    def __init__(
        self, activity: Activity, worker: WorkerId, placement: Placement,
        set_num_threads: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic, set_cores: Callable[[Sequence[int]], None] | None = None,
        sleep: Callable[[float], None] = time.sleep, wait: Callable[[float], None] | None = None,
        spread: Callable[[Sequence[int]], object] = lambda cores: None,
        on_pause: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """`spread` binds the compute thread and those that compute for it to a core each. `on_pause` is
        called again and again while the process waits for its turn, by `wait`."""
        self._activity, self._worker, self._placement = activity, worker, placement
        self._set_num_threads, self._clock, self._sleep = set_num_threads, clock, sleep
        self._set_cores, self._spread, self._on_pause = set_cores or pin_all_threads, spread, on_pause
        self._other = Role.LLM if worker.role is Role.VIT else Role.VIT
        self._idle_since: float | None = None  # of the other role
        self._wait = wait or activity.bell(worker).wait
        self._lock = threading.Lock()  # of the state: two threads of a ViT tell it
        self.is_wide = self._is_busy = self._computes = False
        self._block_from, self._used_lending = 0.0, 0.0
        self.announce(False)  # the predecessor may have died while busy

    @property
    def can_widen(self) -> bool:
        return bool(self._placement.wide_cores)

    @property
    def takes_turns(self) -> bool:
        return self.can_widen and self._placement.takes_turns

    def announce(self, is_busy: bool) -> None:
        """The other role takes no cores of a busy process: to be called as soon as work is expected."""
        self._tell(is_busy=is_busy, computes=None if is_busy else False)

    def _tell(self, is_busy: bool | None = None, computes: bool | None = None) -> None:
        with self._lock:
            self._is_busy = self._is_busy if is_busy is None else is_busy
            self._computes = self._computes if computes is None else computes
            state = IDLE
            if self._is_busy or self._computes:
                state = WIDE if self.is_wide else OWN
            if state != IDLE and self.takes_turns and not self._computes:
                state = PAUSED
            self._activity.announce(self._worker, state)
        if self.takes_turns and state <= PAUSED and self._worker.role is Role.LLM:
            self._activity.wake_paused(self._other)

    # A piece of work.

    def enter(self) -> bool:
        """Announces work, adapts, and waits while the other role computes on all cores. Returns `is_wide`."""
        if self.takes_turns:
            self._take_turn()
            return self.is_wide
        self.adapt()
        self._tell(is_busy=True, computes=True)
        deadline = self._clock() + MAX_WAIT_S
        while self._activity.busiest(self._other) == WIDE and self._clock() < deadline:
            self.adapt()  # if both roles took all cores at once, both return to their own
            self._sleep(POLL_S)
        return self.is_wide

    def leave(self) -> None:
        """The piece of work is done."""
        self._tell(computes=False)

    def adapt(self) -> bool:
        """Takes the other role's cores if it is idle, else returns to its own. Returns `is_wide`. Where the
        roles take turns, a ViT waits here for its next one when its turn is over."""
        if not self.can_widen:
            return False
        if self.takes_turns:
            if self._computes:
                self._go_on()
            return self.is_wide
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
        self.bind()
        self._tell()

    def bind(self) -> None:
        """To be called by the compute thread before its first work, too."""
        place = self._placement
        cores = place.wide_cores if self.is_wide else place.cores
        if self.is_wide or place.num_threads == len(cores):  # else several processes share these cores
            self._spread(cores)

    # Turns.

    @property
    def is_hurried(self) -> bool:
        """The other role waits for the end of the turn: blocks of work are to be short."""
        return self.takes_turns and self._activity.busiest(self._other) != IDLE

    @property
    def is_awaited(self) -> bool:
        """The other role waits for a turn."""
        return self.takes_turns and self._activity.busiest(self._other) == PAUSED

    def lend(self, seconds: float) -> None:
        """The LLM lets the ViTs compute on all cores for so long, or until they have nothing to compute."""
        if seconds <= 0 or not self.is_awaited:
            return
        end = self._activity.lent_until = self._clock() + seconds
        self._tell(computes=False)
        while (left := end - self._clock()) > 0 and self._activity.busiest(self._other) != IDLE:
            self._sleep(min(left, POLL_S))

    def _take_turn(self) -> None:
        """An LLM begins at once, when the ViTs have ended their blocks; a ViT when the cores are lent."""
        self.widen(True)
        if self._worker.role is Role.VIT:
            self._tell(is_busy=True)
            self._await_turn(0.0)
            return
        self._tell(is_busy=True, computes=True)
        deadline = self._clock() + MAX_WAIT_S
        while self._activity.busiest(self._other) == WIDE and self._clock() < deadline:
            self._sleep(TURN_POLL_S)

    def _go_on(self) -> None:
        """After a block: computes the next one, which may take as long, or waits for the next turn."""
        now = self._clock()
        block_s = now - self._block_from
        if not self._is_lent(block_s):
            self._tell(computes=False)
            self._await_turn(block_s)
        else:
            self._block_from = now

    def _await_turn(self, block_s: float) -> None:
        while True:
            if self._is_lent(block_s):
                self._tell(computes=True)
                if self._is_lent(block_s):  # else the LLM has begun in the same moment
                    break
                self._tell(computes=False)
            self._on_pause()
            self._wait(PAUSE_S)
        self._used_lending = self._activity.lent_until
        self._block_from = self._clock()

    def _is_lent(self, block_s: float) -> bool:
        """Whether the cores are lent for most of a block of so many seconds; in any turn for one at least."""
        llm = self._activity.busiest(self._other)
        if llm != PAUSED:
            return llm == IDLE
        end, now = self._activity.lent_until, self._clock()
        return now + block_s / 2 < end or (now < end and end != self._used_lending)


def pin_all_threads(cores: Sequence[int]) -> None:
    """Every thread of this process: `sched_setaffinity(0, …)` would leave a library's threads where they
    are."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
