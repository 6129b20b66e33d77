"""What the launcher knows of its workers: units that start and end together, and how long they stay down.

STARTING → SERVING → ENDING (one member died, the others are killed) → DOWN (all reaped) → STARTING …
"""

from __future__ import annotations

import enum
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.process.flight_recorder import FlightRecorder
from pipeline.process.fork_server import WorkerProcess
from pipeline.wire.messages import WorkerReady, WorkerState, WorkerStats
from pipeline.wire.metrics import Metric
from pipeline.wire.topology import Role, WorkerId

FIRST_EPOCH = 1
STABLE_S = 10.0  # who served so long before it died is started again at once
REPORT_S = 60.0  # a start that takes longer is told of so often
MAX_FAILED_STARTS = 5  # in a row: what fails each time before its first piece of work will do so again
FIRST_DELAY_S, MAX_DELAY_S = 0.25, 10.0
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
MAX_UNMAP_S = 10.0  # the successor waits so long for others to close the dead one's memory


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    ENDING = "ending"
    DOWN = "down"


@dataclass(slots=True, eq=False)
class Child:
    """One incarnation of a worker."""

    worker: WorkerId
    epoch: int
    process: WorkerProcess
    ready: WorkerReady | None = None
    stats: WorkerStats | None = None
    stats_time: float = 0.0
    error: str = ""
    error_time: float = math.inf
    num_moves: int = -1
    moved_at: float = math.inf  # from when on it should


@dataclass(slots=True, eq=False)
class Unit:
    """Workers that need each other's memory: a ViT alone, all ranks of a group together."""

    members: tuple[WorkerId, ...]
    children: dict[WorkerId, Child] = field(default_factory=dict)
    phase: Phase = Phase.DOWN
    epoch: int = FIRST_EPOCH
    executed: tuple[bytes, ...] = ()  # in the incarnation before, when it died
    has_served: bool = False
    served_at: float = 0.0
    died_at: float = 0.0
    num_deaths: int = 0  # in a row, each soon after the start
    is_planned: bool = False  # its end: no request is to blame
    is_closed: bool = False  # it serves what it has, and clients are told that it is down
    num_failed_starts: int = 0  # in a row: ended before it was ready, or by itself before its first work
    has_proven: bool = False  # once, for long or with a request: what ends it later is no reason to give up
    begun_at: float = 0.0
    report_due: float = 0.0
    news_at: float = 0.0  # when one of its members last said something
    due: float = 0.0  # when the successor is to start
    unmapping: set[WorkerId] = field(default_factory=set)  # who still has the dead one's memory mapped

    @property
    def name(self) -> str:
        return (
            str(self.members[0])
            if len(self.members) == 1
            else f"{self.members[0]} to {self.members[-1].rank}"
        )

    @property
    def is_serving(self) -> bool:
        return self.phase is Phase.SERVING

    def states(self, now: float = 0.0) -> list[WorkerState]:
        ready = {
            worker: child.ready
            for worker, child in self.children.items()
            if child.ready is not None and self.phase is not Phase.ENDING and not self.is_closed
        }
        return [self._state_of(worker, ready.get(worker), now) for worker in self.members]

    def _state_of(self, worker: WorkerId, ready: WorkerReady | None, now: float) -> WorkerState:
        if ready is None:
            return WorkerState(worker, self.epoch, False, 0, self.executed)
        told = _told(self.children[worker], now)
        return WorkerState(worker, self.epoch, True, ready.credits, self.executed, *told)

    def begin(self, children: Sequence[Child], now: float) -> None:
        self.children = {child.worker: child for child in children}
        self.phase, self.begun_at, self.news_at, self.report_due = Phase.STARTING, now, now, now + REPORT_S

    def is_late(self, now: float, patience_s: float) -> bool:
        """Whether it stands still in its start.

        What it loads may take longer than that, but then it tells how far it is.
        """
        return self.phase is Phase.STARTING and now - self.news_at > patience_s

    def report(self, now: float) -> str:
        """What it is doing, once a minute while it starts; else nothing."""
        if self.phase is not Phase.STARTING or now < self.report_due:
            return ""
        self.report_due = now + REPORT_S
        starting = [child.stats for child in self.children.values() if child.ready is None]
        stats = next(filter(None, starting), None)
        doing = "it has told nothing" if stats is None else f"{stats.phase}, {stats.done} of {stats.total}"
        return f"{self.name} has been starting for {now - self.begun_at:.0f} s: {doing}"

    def on_ready(self, now: float) -> None:
        """A member is ready; together they serve."""
        if self.phase is Phase.STARTING and all(child.ready is not None for child in self.children.values()):
            self.phase, self.has_served, self.served_at = Phase.SERVING, True, now

    def on_death(self, now: float, code: int = -signal.SIGKILL, has_worked: bool = False) -> bool:
        """One member has died, and the others are to be killed. Whether to give the pipeline up.

        That is so for one that has never served for long, nor computed a request, once so many starts in a
        row have failed: at once where the very first ends by itself, since it explains a wrong option.
        Otherwise a unit is started again for ever, at longer and longer intervals; the others serve
        meanwhile. `code` is the exit code of who died first; who is killed from outside while it serves has
        not failed.
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
        """It is to be replaced though nothing is wrong with it."""
        self.phase, self.died_at, self.num_deaths, self.is_planned = Phase.ENDING, now, 0, True
        for child in self.children.values():
            child.process.kill()

    @property
    def is_reaped(self) -> bool:
        return self.phase is Phase.ENDING and all(
            child.process.exit_code is not None for child in self.children.values()
        )

    def on_reaped(self, now: float, executed: tuple[bytes, ...], mapped_by: set[WorkerId]) -> None:
        """All are dead for good: from now on the next epoch counts."""
        self.children = {}
        self.phase, self.executed, self.unmapping = Phase.DOWN, () if self.is_planned else executed, mapped_by
        self.is_planned = False
        self.epoch += 1
        self.due = now + (
            0.0 if self.num_deaths <= 1 else min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (self.num_deaths - 2))
        )

    def wakes_at(self) -> float:
        """When it is to start if nothing happens before."""
        if self.phase is not Phase.DOWN:
            return math.inf
        return max(self.due, self.died_at + MAX_UNMAP_S) if self.unmapping else self.due


def _told(child: Child, now: float) -> tuple[int, dict[str, int], float, tuple[Metric, ...]]:
    """Open requests, counters, the seconds since they were told, and what they are."""
    details = child.ready.details if child.ready else {}
    if child.stats is None:
        return 0, details, 0.0, ()
    silent_s = round(max(0.0, now - child.stats_time), 1)
    stats = child.stats
    return stats.num_open_requests, {**details, **stats.counters}, silent_s, stats.metrics


def units(workers: Sequence[WorkerId], tp: int) -> list[Unit]:
    """All LLM ranks of a group in one unit, since a collective cannot lose a member; everybody else alone."""
    ranks = sorted(worker for worker in workers if worker.role is Role.LLM)
    groups = [tuple(ranks[first : first + tp]) for first in range(0, len(ranks), tp)]
    return [Unit(group) for group in groups] + [
        Unit((worker,)) for worker in workers if worker.role is not Role.LLM
    ]


def has_moved(child: Child, recorder: FlightRecorder, now: float, patience_s: float) -> bool:
    """Whether a serving worker has given a sign of life within `patience_s`, or has announced that none will
    come yet."""
    if (num_moves := recorder.num_moves) != child.num_moves:
        child.num_moves, child.moved_at = num_moves, now
    return now - child.moved_at < patience_s or now < recorder.deadline
