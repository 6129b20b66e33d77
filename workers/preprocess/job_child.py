"""A process that takes one job after another, as its parent sees it.

Jobs go to its stdin and answers come from its stdout, each as a length (uint32) and a MessagePack.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DESCRIPTORS_OF_START = 16  # more than the start of a process needs
NUM_CHECKS = 6  # of a child's processor time within the time that it may stand still


async def start_process(
    module: str, *arguments: str | int, pass_fds: Sequence[int] = ()
) -> asyncio.subprocess.Process:
    """Raises OSError for a shortage on this machine; uvloop's may have no errno."""
    _check_descriptors()
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *map(str, arguments), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, pass_fds=pass_fds,
    )  # fmt: skip


class JobChild:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def exchange(self, job: bytes, stall_s: float) -> bytes:
        """The answer to a job.

        Raises TimeoutError after `stall_s` without processor time, IncompleteReadError if the process ends.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<I", len(job)) + job)
        answer = asyncio.ensure_future(self._read_answer())
        last_ticks, moved_at = -1, time.monotonic()
        try:
            while not (await asyncio.wait({answer}, timeout=stall_s / NUM_CHECKS))[0]:
                ticks, now = _processor_ticks(self.pid), time.monotonic()
                if ticks != last_ticks:
                    last_ticks, moved_at = ticks, now
                elif now - moved_at >= stall_s:
                    raise TimeoutError
            return answer.result()
        finally:
            answer.cancel()

    async def _read_answer(self) -> bytes:
        assert self._process.stdout is not None
        (length,) = struct.unpack("<I", await self._process.stdout.readexactly(4))
        return await self._process.stdout.readexactly(length)

    async def kill(self) -> None:
        """Ends the child and reaps it."""
        if self._process.returncode is None:
            # Not by Popen.kill: it polls first, which takes an ended child's status from the loop's watcher.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        await self._process.wait()


def _check_descriptors() -> None:
    """Raises OSError if too few are free to start a process: uvloop's failure leaks those it has opened."""
    spare: list[int] = []
    try:
        while len(spare) < DESCRIPTORS_OF_START:
            spare.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for number in spare:
            os.close(number)


def _processor_ticks(pid: int) -> int:
    """Processor time of a process, in user and in system mode. Its name, in brackets, may contain spaces."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0
