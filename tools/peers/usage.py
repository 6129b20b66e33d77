"""Who uses the cores, and how much memory a server holds: read from /proc.

Time of the cores that is neither a server's nor ours is others', and so is what the host took away ("steal").
A figure is refused where others had more than a share of the cores.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# The kernel counts its own time in ticks: less than this cannot be told from nothing.
LEAST_OTHERS_S = 0.04
SAMPLE_S = 0.2  # between two looks at a server's memory


class ProcessStat(NamedTuple):
    """Of /proc/PID/stat."""

    parent: int
    session: int
    seconds: float  # of CPU, with those of its ended children


class CpuTime(NamedTuple):
    """Seconds of all cores together since the machine started."""

    busy: float
    stolen: float


class Moment(NamedTuple):
    """What stood in /proc at one time."""

    at: float  # time.perf_counter()
    cores: CpuTime
    own: float  # seconds of CPU of the server and of this process


class Use(NamedTuple):
    """Of the cores, between two moments."""

    seconds: float
    num_cores: int
    own_s: float
    others_s: float  # with stolen time

    @property
    def others_share(self) -> float:
        return self.others_s / (self.seconds * self.num_cores)

    def is_refused(self, limit: float) -> bool:
        """Whether others had more than `limit` of the cores."""
        return self.others_s > max(limit * self.seconds * self.num_cores, LEAST_OTHERS_S)


def parse_stat(text: str) -> ProcessStat:
    """Of a line of /proc/PID/stat."""
    words = text.rpartition(")")[2].split()
    return ProcessStat(int(words[1]), int(words[3]), sum(map(int, words[11:15])) / TICKS)


def parse_cores(text: str) -> CpuTime:
    """Of the first line of /proc/stat: user nice system idle iowait irq softirq steal ..."""
    ticks = [int(word) for word in text.split()[1:9]]
    return CpuTime((sum(ticks[:3]) + ticks[5] + ticks[6]) / TICKS, ticks[7] / TICKS)


def use_between(before: Moment, after: Moment, num_cores: int) -> Use:
    own = after.own - before.own
    stolen = after.cores.stolen - before.cores.stolen
    others = max(0.0, after.cores.busy - before.cores.busy - own) + stolen
    return Use(after.at - before.at, num_cores, own, others)


def all_stats() -> dict[int, ProcessStat]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(folder.name)] = parse_stat((folder / "stat").read_text())
    return found


def tree_of(root: int, stats: Mapping[int, ProcessStat]) -> set[int]:
    """The process, those that come from it, and those of its session."""
    tree = {pid for pid, stat in stats.items() if pid == root or stat.session == root}
    while more := {pid for pid, stat in stats.items() if stat.parent in tree} - tree:
        tree |= more
    return tree


def look(root: int | None) -> Moment:
    """`root`: a server's first process, or None where no server runs."""
    stats = all_stats()
    tree = tree_of(root, stats) if root is not None else set()
    times = os.times()
    own = sum(stats[pid].seconds for pid in tree) + times.user + times.system
    with open("/proc/stat") as file:
        return Moment(time.perf_counter(), parse_cores(file.readline()), own)


def wait_for_quiet(limit: float, timeout_s: float) -> float:
    """Waits until others leave the cores alone for a second, and tells the share that they had last."""
    num_cores, end = os.cpu_count() or 1, time.monotonic() + timeout_s
    while True:
        before = look(None)
        time.sleep(1.0)
        use = use_between(before, look(None), num_cores)
        if not use.is_refused(limit) or time.monotonic() > end:
            return use.others_share


def held_bytes(root: int) -> int:
    """PSS of a server: what it shares with others counts in part."""
    return sum(map(pss_of, tree_of(root, all_stats())))


def pss_of(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


class PeakMemory:
    """The most that a server was seen to hold."""

    def __init__(self) -> None:
        self.nbytes = 0

    @contextlib.contextmanager
    def watch(self, root: int) -> Iterator[None]:
        """Looks every SAMPLE_S, in a thread: not while anything is timed that this may disturb."""
        is_over = threading.Event()

        def run() -> None:
            while not is_over.wait(SAMPLE_S):
                self.nbytes = max(self.nbytes, held_bytes(root))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
