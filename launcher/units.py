"""Units: workers that start and end together, their phases, and how long a restart is delayed.

STARTING → SERVING → ENDING (a member died, the supervisor kills the rest) → DOWN (all reaped) → STARTING …
"""

from __future__ import annotations

import enum
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipeline.process.flight_recorder import FlightRecorder
from pipeline.wire.control import WorkerReady, WorkerState, WorkerStats
from pipeline.wire.metrics import Metric, Number
from pipeline.wire.topology import Role, WorkerId

FIRST_EPOCH = 1
STABLE_S = 10.0  # a unit that served so long before it died is started again at once
REPORT_S = 60.0  # a start that takes longer is logged so often
MAX_FAILED_STARTS = 5  # in a row, each before the first request was computed
FIRST_DELAY_S, MAX_DELAY_S = 0.25, 10.0
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
MAX_UNMAP_S = 10.0  # a successor waits so long until the dead worker's pool is unmapped everywhere


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    ENDING = "ending"
    DOWN = "down"


class Process(Protocol):
    """A worker's process, here or on another node."""

    exit_code: int | None  # None while it lives; negative: the signal that killed it

    @property
    def pid(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self, timeout_s: float | None = None) -> bool: ...


@dataclass(slots=True, eq=False)
class Child:
    """One incarnation of a worker."""

    worker: WorkerId
    epoch: int
    process: Process
    urls: dict[str, str] = field(default_factory=dict)  # as in `WorkerState`
    ready: WorkerReady | None = None
    stats: WorkerStats | None = None
    stats_time: float = 0.0
    error: str = ""
    error_time: float = math.inf
    num_moves: int = -1
    moved_at: float = math.inf  # inf: the watch for hangs begins with READY


class Death(NamedTuple):
    code: int  # negative: the signal
    reason: str


@dataclass(slots=True, eq=False)
class Unit:
    """Workers that start and end together: all ranks of an LLM group, or one worker of another role."""

    members: tuple[WorkerId, ...]
    nodes: tuple[int, ...] = (0,)  # of its members
    is_absent: bool = False  # a node of it has not joined, or has left: it has no successor
    children: dict[WorkerId, Child] = field(default_factory=dict)
    phase: Phase = Phase.DOWN
    epoch: int = FIRST_EPOCH
    executed: tuple[bytes, ...] = ()  # digests of the requests that were executing at the last death
    has_served: bool = False
    served_at: float = 0.0
    died_at: float = 0.0
    num_deaths: int = 0  # in a row, each soon after the start
    is_planned: bool = False  # it ends for a reload: no request is to blame
    is_closed: bool = False  # it finishes its open requests, and is published as not ready
    num_failed_starts: int = 0  # in a row: ended before READY, or by itself before its first request
    has_proven: bool = False  # it once served for `STABLE_S`, or a request: it never ends the pipeline
    is_killed: bool = False  # by the launcher, since it began
    begun_at: float = 0.0
    report_due: float = 0.0
    news_at: float = 0.0  # of the last message from a member
    due: float = 0.0  # of the successor's start
    unmapping: set[WorkerId] = field(default_factory=set)  # workers that still map the dead worker's pool

    @property
    def name(self) -> str:
        return (
            str(self.members[0])
            if len(self.members) == 1
            else f"{self.members[0]} to {self.members[-1].rank}"
        )

    @property
    def role(self) -> Role:
        return self.members[0].role

    @property
    def holds_weights(self) -> bool:
        return self.role in (Role.VIT, Role.LLM)

    @property
    def is_serving(self) -> bool:
        return self.phase is Phase.SERVING

    @property
    def is_alive(self) -> bool:
        return self.phase in (Phase.STARTING, Phase.SERVING)

    @property
    def has_dead_member(self) -> bool:
        """A member has ended before the supervisor killed the unit."""
        return self.is_alive and any(child.process.exit_code is not None for child in self.children.values())

    def states(self, now: float = 0.0) -> list[WorkerState]:
        ready = {
            worker: child.ready
            for worker, child in self.children.items()
            if child.ready is not None and self.phase is not Phase.ENDING and not self.is_closed
        }
        return [self._state_of(worker, ready.get(worker), now) for worker in self.members]

    def _state_of(self, worker: WorkerId, ready: WorkerReady | None, now: float) -> WorkerState:
        urls = self.children[worker].urls if worker in self.children else {}
        if ready is None:
            return WorkerState(worker, self.epoch, False, 0, self.executed, urls=urls)
        load = _load_of(self.children[worker], now)
        return WorkerState(worker, self.epoch, True, ready.credits, self.executed, *load, urls=urls)

    def begin(self, children: Sequence[Child], now: float) -> None:
        self.children = {child.worker: child for child in children}
        self.phase, self.begun_at, self.news_at, self.report_due = Phase.STARTING, now, now, now + REPORT_S
        self.is_killed = False

    def is_late(self, now: float, patience_s: float) -> bool:
        """Whether a start has sent no message for `patience_s`. A long load reports its progress."""
        return self.phase is Phase.STARTING and now - self.news_at > patience_s

    def late_members(self) -> str:
        return ", ".join(str(worker) for worker, child in self.children.items() if not child.ready)

    def report(self, now: float) -> str:
        """The progress of the start, once every `REPORT_S`; else empty."""
        if self.phase is not Phase.STARTING or now < self.report_due:
            return ""
        self.report_due = now + REPORT_S
        starting = [child.stats for child in self.children.values() if child.ready is None]
        stats = next(filter(None, starting), None)
        doing = "no progress yet" if stats is None else f"{stats.phase}, {stats.done} of {stats.total}"
        return f"{self.name} has been starting for {now - self.begun_at:.0f} s: {doing}"

    def on_ready(self, now: float) -> None:
        """A member is ready; the unit serves once all are."""
        if self.phase is Phase.STARTING and all(child.ready is not None for child in self.children.values()):
            self.phase, self.has_served, self.served_at = Phase.SERVING, True, now

    def first_death(self) -> Death:
        """Of several that ended, the one that was killed, else the first that reported an error.

        The others may have ended because of it, as ranks do.
        """
        dead = [
            (child.process.exit_code, child)
            for child in self.children.values()
            if child.process.exit_code is not None
        ]
        code, child = min(dead, key=lambda end: (end[0] >= 0, end[1].error_time))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL and self.phase is Phase.STARTING and not self.is_killed:
            how += " while it started, most likely for lack of memory"
        return Death(code, f"{child.worker} {how}{': ' if child.error else ''}{child.error}")

    def on_death(self, now: float, code: int = -signal.SIGKILL, has_worked: bool = False) -> bool:
        """A member has died. Whether the pipeline is to end, instead of a restart.

        It ends when a unit that has neither served for `STABLE_S` nor computed a request fails
        `MAX_FAILED_STARTS` starts in a row; and at once when the very first start ends by itself, most likely
        for a wrong option. Any other unit is started again without limit, at growing intervals. `code` is the
        exit code of the first death. A unit killed from outside while it serves has not failed.
        """
        is_first, was_serving = not self.has_served, self.is_serving
        is_stable = self.is_serving and now - self.served_at >= STABLE_S
        self.num_deaths = 0 if is_stable else self.num_deaths + 1
        if is_stable or (was_serving and has_worked):
            self.has_proven, self.num_failed_starts = True, 0
        elif is_first or (was_serving and code not in FROM_OUTSIDE):
            self.num_failed_starts += 1
        self.phase, self.died_at = Phase.ENDING, now
        if self.has_proven:
            return False
        return (is_first and code >= 0) or self.num_failed_starts >= MAX_FAILED_STARTS

    def on_end(self, now: float) -> None:
        """Ends a healthy unit, to be replaced."""
        self.phase, self.died_at, self.num_deaths, self.is_planned = Phase.ENDING, now, 0, True
        self.kill()

    def kill(self) -> None:
        self.is_killed = True
        for child in self.children.values():
            child.process.kill()

    @property
    def is_reaped(self) -> bool:
        return self.phase is Phase.ENDING and all(
            child.process.exit_code is not None for child in self.children.values()
        )

    def on_reaped(self, now: float, executed: tuple[bytes, ...], mapped_by: set[WorkerId]) -> None:
        """All members are reaped: the next epoch begins."""
        self.children = {}
        self.phase, self.executed, self.unmapping = Phase.DOWN, () if self.is_planned else executed, mapped_by
        self.is_planned = False
        self.epoch += 1
        self.due = now + (
            0.0 if self.num_deaths <= 1 else min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (self.num_deaths - 2))
        )

    def is_due(self, now: float) -> bool:
        """Whether its successor is to start now."""
        return now >= self.wakes_at()

    def wakes_at(self) -> float:
        """When the successor is to start, if no pool is unmapped before."""
        if self.phase is not Phase.DOWN or self.is_absent:
            return math.inf
        return max(self.due, self.died_at + MAX_UNMAP_S) if self.unmapping else self.due


def _load_of(child: Child, now: float) -> tuple[int, dict[str, Number], float, tuple[Metric, ...]]:
    """Open requests, counters, the age of these figures in seconds, and the declared metrics."""
    details: dict[str, Number] = dict(child.ready.details) if child.ready else {}
    if child.stats is None:
        return 0, details, 0.0, ()
    silent_s = round(max(0.0, now - child.stats_time), 1)
    stats = child.stats
    return stats.num_open_requests, {**details, **stats.counters}, silent_s, stats.metrics


def units(
    workers: Sequence[WorkerId], tp: int, node_of: Callable[[WorkerId], int] = lambda worker: 0
) -> list[Unit]:
    """One for all LLM ranks of a group, since a collective cannot lose a member; one for any other worker."""
    ranks = sorted(worker for worker in workers if worker.role is Role.LLM)
    groups = [tuple(ranks[first : first + tp]) for first in range(0, len(ranks), tp)]
    others = [(worker,) for worker in workers if worker.role is not Role.LLM]
    return [Unit(members, tuple(sorted(set(map(node_of, members))))) for members in (*groups, *others)]


def has_moved(child: Child, recorder: FlightRecorder, now: float, patience_s: float) -> bool:
    """Whether a serving worker has moved on within `patience_s`, or is within the deadline of a long call."""
    if (num_moves := recorder.num_moves) != child.num_moves:
        child.num_moves, child.moved_at = num_moves, now
    return now - child.moved_at < patience_s or now < recorder.deadline
