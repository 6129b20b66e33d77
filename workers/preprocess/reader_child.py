"""One process that reads media (`reader_process.py`), as its parent sees it."""

from __future__ import annotations

import asyncio
import errno
import os

import msgspec

from pipeline.transport.memory import create_memory_file
from workers.preprocess.job_child import JobChild, start_process
from workers.preprocess.reader_process import Answer, Job

NO_VIDEO = -1
WRITE_BYTES = 1 << 20  # into an inbox in one call; other tasks run in between


class ReaderChild(JobChild):
    def __init__(self, process: asyncio.subprocess.Process, inbox: int) -> None:
        super().__init__(process)
        self._inbox = inbox  # a descriptor
        self.video = NO_VIDEO  # the number of the file that the child has open

    @classmethod
    async def start(cls, pool_fd: int, memory_mib: int, video_reader: str) -> ReaderChild:
        """Raises OSError for a shortage on this machine; uvloop's may have no errno."""
        inbox = create_memory_file("inbox", 0)
        try:
            process = await start_process(
                "workers.preprocess.reader_process", pool_fd, inbox, memory_mib, video_reader,
                pass_fds=(pool_fd, inbox),
            )  # fmt: skip
        except BaseException:
            os.close(inbox)
            raise
        return cls(process, inbox)

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
        data = await self.exchange(msgspec.msgpack.encode(job), stall_s)
        answer: Answer = msgspec.msgpack.decode(data, type=Answer)
        return answer

    async def kill(self) -> None:
        """Ends the child and reaps it."""
        await super().kill()
        os.close(self._inbox)
