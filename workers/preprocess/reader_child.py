"""One process that reads media (`reader_process.py`), as its parent sees it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import struct
import sys
import time
from pathlib import Path

import msgspec

from pipeline.transport.memory import create_memory_file
from workers.preprocess.reader_process import Answer, Job

NO_VIDEO = -1
WRITE_BYTES = 1 << 20  # into an inbox in one call; other tasks run in between
DESCRIPTORS_OF_START = 16  # more than the start of a process needs
NUM_CHECKS = 6  # of a child's processor time within the time that it may stand still


class ReaderChild:
    def __init__(self, process: asyncio.subprocess.Process, inbox: int) -> None:
        self._process, self._inbox = process, inbox  # `inbox` is a descriptor
        self.video = NO_VIDEO  # the number of the file that the child has open

    @classmethod
    async def start(cls, pool_fd: int, memory_mib: int, video_reader: str) -> ReaderChild:
        """Raises OSError for a shortage on this machine; uvloop's may have no errno."""
        _check_descriptors(pool_fd)
        inbox = create_memory_file("inbox", 0)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "workers.preprocess.reader_process", str(pool_fd), str(inbox),
                str(memory_mib), video_reader, stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, pass_fds=(pool_fd, inbox),
            )  # fmt: skip
        except BaseException:
            os.close(inbox)
            raise
        return cls(process, inbox)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def fill(self, data: memoryview) -> None:
        """Writes a picture into the inbox. Raises OSError where there is no memory for it."""
        for start in range(0, len(data), WRITE_BYTES):
            if start:
                await asyncio.sleep(0)
            piece = data[start : start + WRITE_BYTES]
            if os.pwrite(self._inbox, piece, start) != len(piece):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def empty(self) -> None:
        """Gives the inbox's memory back."""
        os.ftruncate(self._inbox, 0)

    def inbox_bytes(self) -> int:
        return os.fstat(self._inbox).st_size

    async def ask(self, job: Job, stall_s: float) -> Answer:
        """Raises TimeoutError after `stall_s` without processor time, IncompleteReadError if it ends."""
        assert self._process.stdin is not None
        data = msgspec.msgpack.encode(job)
        self._process.stdin.write(struct.pack("<I", len(data)) + data)
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

    async def _read_answer(self) -> Answer:
        assert self._process.stdout is not None
        (length,) = struct.unpack("<I", await self._process.stdout.readexactly(4))
        data = await self._process.stdout.readexactly(length)
        answer: Answer = msgspec.msgpack.decode(data, type=Answer)
        return answer

    async def kill(self) -> None:
        """Ends the child and reaps it."""
        if self._process.returncode is None:
            # Not by Popen.kill: it polls first, which takes an ended child's status from the loop's watcher.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        await self._process.wait()
        os.close(self._inbox)


def _check_descriptors(fd: int) -> None:
    """Raises OSError if too few are free to start a process: uvloop's failure leaks those it has opened."""
    spare: list[int] = []
    try:
        while len(spare) < DESCRIPTORS_OF_START:
            spare.append(os.dup(fd))
    finally:
        for number in spare:
            os.close(number)


def _processor_ticks(pid: int) -> int:
    """Processor time of a process, in user and in system mode. Its name, in brackets, may contain spaces."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0
