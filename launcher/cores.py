"""The cores that this process may use: its affinity, cut to the CPU quota of its container."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
PROCESS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores(affinity: Sequence[int], process: Path = PROCESS, mount: Path = MOUNT) -> list[int]:
    """As many cores as the quota pays for, at least one.

    With more threads the quota of a period is spent early, and all threads are throttled for tens of
    milliseconds. The cores are drawn at random: every container on a machine sees the same list, and all
    would take the first few.
    """
    cores = sorted(affinity)
    quota = cpu_quota(process, mount)
    if quota is None or quota >= len(cores):
        return cores
    count = max(1, int(quota))
    start = random.randrange(len(cores) - count + 1)
    logger.info("%d of %d cores are used: the control group's quota is %.3g", count, len(cores), quota)
    return cores[start : start + count]


def cpu_quota(process: Path = PROCESS, mount: Path = MOUNT) -> float | None:
    """The quota of this process's control groups in cores; None without a limit."""
    return min(_quotas(process, mount), default=None)


def _quotas(process: Path, mount: Path) -> Iterator[float]:
    for line in _read(process).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # version 2
            for folder in (*_upwards(mount, path), *_upwards(mount / "unified", path)):
                yield from _quota_of(*_read(folder / "cpu.max").split()[:2])
        elif "cpu" in controllers.split(","):  # version 1; its mount may have the one name or both
            for name in dict.fromkeys((controllers, "cpu", "cpu,cpuacct")):
                for folder in _upwards(mount / name, path):
                    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
                    yield from _quota_of(_read(quota), _read(period))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folders of a group and of its parents, up to the mount.

    In a container the path may be the host's; then only the mount exists.
    """
    folder = root / path.strip().lstrip("/")
    while folder.is_relative_to(root):
        yield folder
        folder = folder.parent


def _quota_of(quota: str = "", period: str = "100000") -> Iterator[float]:
    """Nothing for "max", for -1 (version 1), and for what is no number: no limit."""
    if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
