"""A turn: one server alone on the machine, from its start to its end, and all figures of it.

A figure is refused where others used the cores meanwhile; what does not need a new start is then measured
again, after a wait for quiet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.memory_rate import memory_rate
from tools.peers.adapters import Limits, Peer
from tools.peers.figures import Figure, Turn
from tools.peers.load import Client, Load, Texts
from tools.peers.serving import running
from tools.peers.usage import PeakMemory, Use, held_bytes, look, use_between, wait_for_quiet

MAX_TRIES = 3  # for a figure
QUIET_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Of all turns."""

    checkpoint: Path
    folder: Path  # for converted models and logs
    limits: Limits
    parts: Sequence[str]
    num_output: int
    num_repeats: int
    max_others: float  # share of the cores
    lock: Path | None = None  # a file whose lock is held in each turn


class Meter:
    """Takes figures and refuses those in which others used the cores."""

    def __init__(self, max_others: float, root: int) -> None:
        self._max_others, self._root = max_others, root
        self._num_cores = os.cpu_count() or 1

    def use_of(self, call: Callable[[], float]) -> tuple[float, Use]:
        before = look(self._root)
        value = call()
        return value, use_between(before, look(self._root), self._num_cores)

    def figure(self, call: Callable[[], float]) -> Figure:
        for _ in range(MAX_TRIES):
            value, use = self.use_of(call)
            if not use.is_refused(self._max_others):
                return Figure(value, use.others_share)
            wait_for_quiet(self._max_others, QUIET_TIMEOUT_S)
        return Figure(None, use.others_share)


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Others who take turns on this machine by the same file wait, and we for them."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Measurement:
    """Of a turn, as far as it has come."""

    def __init__(self, peer: Peer, model: Path, plan: Plan, number: int) -> None:
        self._peer, self._model, self._plan, self._number = peer, model, plan, number
        self.figures: dict[str, Figure] = {}
        self.answers: tuple[str, ...] = ()

    def run(self) -> None:
        plan, peak = self._plan, PeakMemory()
        texts = Texts(plan.checkpoint, random.Random(self._number))
        started, before = time.perf_counter(), look(None)
        with running(self._peer, self._model, plan.limits, plan.folder / f"{self._peer.key}.log") as server:
            root = server.process.pid
            load = Load(Client(self._peer, self._model, server.url), texts, plan.num_output, plan.num_repeats)
            with peak.watch(root):
                server.wait_until_healthy()
                load.first_answer()
            seconds = time.perf_counter() - started
            use = use_between(before, look(root), plan.limits.num_cores)
            is_good = not use.is_refused(plan.max_others)
            self.figures["start"] = Figure(seconds if is_good else None, use.others_share)
            with peak.watch(root):
                load.warm_up()
            self.answers = load.first_tokens()
            meter = Meter(plan.max_others, root)
            for name in plan.parts:
                self.figures[name] = meter.figure(load.parts[name])
            held = held_bytes(root)
            self.figures["memory"] = Figure(float(held), 0.0)
            self.figures["peak"] = Figure(float(max(held, peak.nbytes)), 0.0)


def take_turn(peer: Peer, model: Path, plan: Plan, number: int) -> Turn:
    """A server that fails ends its turn with an error, not the run."""
    with locked(plan.lock):
        wait_for_quiet(plan.max_others, QUIET_TIMEOUT_S)
        rate, error = memory_rate().bytes_per_s, ""
        found = Measurement(peer, model, plan, number)
        try:
            found.run()
        except (RuntimeError, OSError) as failure:
            error = str(failure) or type(failure).__name__
    return Turn(
        peer=peer.key, round=number, figures=found.figures, memory_rate=rate, error=error,
        answers=found.answers,
    )  # fmt: skip
