"""The limits that a child of preprocess sets itself before it takes jobs."""

from __future__ import annotations

import contextlib
import mmap
import resource
from pathlib import Path

LIMIT_SLACK_BYTES = 4 << 20  # for mappings of Python itself


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_bytes() -> int:
    """Of now: the most that a process has had (getrusage) begins with its parent's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limit_memory(mib: int) -> None:
    """Limits memory to the present size plus `mib`. Beyond, allocations fail or end the process."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # lifts the limit inherited from preprocess
    limit = mapped_bytes() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")  # the kernel kills this process before preprocess


def has_met_its_limit() -> bool:
    """Whether an allocation failed at this process's limit, not for lack of memory on the machine."""
    left = resource.getrlimit(resource.RLIMIT_AS)[0] - mapped_bytes() - LIMIT_SLACK_BYTES
    if left <= 0:
        return True
    try:
        mmap.mmap(-1, left, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()  # without touching a page
    except (OSError, MemoryError):
        return False
    return True
