"""How many cores this process may use: those that it may run on, as far as a container's quota goes."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
PROCESS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores(affinity: Sequence[int], process: Path = PROCESS, mount: Path = MOUNT) -> list[int]:
    """As many of the cores as the quota has time for, at least one.

    More threads than that would all stand still together, for tens of milliseconds, once the quota of a
    period is spent. Which cores is drawn: every container on a machine sees the same ones, and the first
    few would be everybody's.
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
    """Cores' worth of time that the control groups of this process allow; None without a limit."""
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
    """The folder of a group and all above it, up to the mount.

    In a container the path may be the host's, of which only the mount is there.
    """
    folder = root / path.strip().lstrip("/")
    while folder.is_relative_to(root):
        yield folder
        folder = folder.parent


def _quota_of(quota: str = "", period: str = "100000") -> Iterator[float]:
    """ "max", or -1 in version 1, is no limit; nor is what is no number."""
    if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
