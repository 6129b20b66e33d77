"""What this machine has."""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePosixPath


def machine_memory(
    meminfo: Path = Path("/proc/meminfo"),
    own: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Bytes of memory of the machine or of the container, whichever is less."""
    lines = meminfo.read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    limits = [total]
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
        groups = [PurePosixPath(line.split(":", 2)[2]).relative_to("/") for line in lines]
        parts = {part for group in groups for part in (group, *group.parents)}
        # Version 1 mounts each controller in a folder of its own.
        for folder in {mount / part for mount in (root, root / "memory") for part in parts}:
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(int((folder / name).read_text()))
    return min(limits)
