"""Collectives of ranks on one host, through memory that all of them have mapped.

gloo sends every sum through the loopback's sockets and a thread of its own: milliseconds where ranks share
cores, twice a layer.
"""

from __future__ import annotations

import os
import platform
import select
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.transport.memory import HostMemory, create_memory_file

PART_BYTES = 1 << 20  # of one rank; more goes in pieces
LINE = 64  # bytes: who counts up must not take the others' counters out of a core's cache
NUM_SPINS = 200  # looks before the core is offered to whoever else may run on it
NUM_YIELDS = 2000  # before it is left
SLEEP_S = 50e-6
TIMEOUT_S = 300.0


def is_available() -> bool:
    """Whether stores are seen in the order in which they were made, as here the data's must be before the
    counter's."""
    return platform.machine() in ("x86_64", "AMD64")


class SharedMemory:
    """Each rank writes its part and counts up; once all have, each reads all parts. So all compute the same,
    to the bit.

    There are two sets of parts, used in turn: who writes a set again has seen that everybody was done with
    it, for since then they have written the other.
    """

    def __init__(self, rank: int, pids: Sequence[int], memory: HostMemory) -> None:
        """`pids`: the process of each rank."""
        size = len(pids)
        self._rank, self._memory = rank, memory
        self._others = {other: os.pidfd_open(pid) for other, pid in enumerate(pids) if other != rank}
        self._counters = memory.buffer[: size * LINE].cast("q")
        self._parts = memory.tensor(size * LINE, (2, size, PART_BYTES), "uint8")
        self._count = 0

    @classmethod
    def connect(cls, rank: int, size: int) -> SharedMemory:
        """The ranks of the process group that is there already; the first makes the memory, the others open
        it."""
        nbytes = size * LINE + 2 * size * PART_BYTES
        fd = create_memory_file("ranks", nbytes) if rank == 0 else -1
        places = torch.empty(size, 2, dtype=torch.int64)
        dist.all_gather(list(places), torch.tensor([os.getpid(), fd]))
        pids, fds = places.T.tolist()
        if rank > 0:
            fd = os.open(f"/proc/{pids[0]}/fd/{fds[0]}", os.O_RDWR | os.O_CLOEXEC)
        made = cls(rank, pids, HostMemory(fd, nbytes))
        dist.barrier()  # else the first might close what others have still to open
        os.close(fd)
        return made

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, in place where x is contiguous."""
        x = x.contiguous()
        for piece in x.view(-1).split(PART_BYTES // x.element_size()):
            torch.sum(self._exchange(piece), 0, dtype=x.dtype, out=piece)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' x, as [num_ranks, *x.shape]."""
        flat = x.contiguous().view(-1)
        out = torch.empty(len(self._others) + 1, len(flat), dtype=x.dtype)
        length = PART_BYTES // x.element_size()
        for first in range(0, len(flat), length):
            out[:, first : first + length] = self._exchange(flat[first : first + length])
        return out.view(-1, *x.shape)

    def _exchange(self, piece: Tensor) -> Tensor:
        """All ranks' pieces [num_ranks, n]; they stay until the exchange after the next."""
        self._count += 1
        parts = self._parts[self._count % 2, :, : piece.nbytes].view(piece.dtype)
        parts[self._rank] = piece
        self._counters[self._rank * LINE // 8] = self._count
        for other in self._others:
            self._wait(other)
        return parts

    def _wait(self, other: int) -> None:
        """Raises ConnectionError when that rank ends, TimeoutError when it does not come."""
        counters, index, count, turns, end = self._counters, other * LINE // 8, self._count, 0, 0.0
        process = self._others[other]
        while counters[index] < count:
            turns += 1
            if turns < NUM_SPINS:
                continue
            if turns < NUM_YIELDS:
                os.sched_yield()
                continue
            end = end or time.monotonic() + TIMEOUT_S
            if time.monotonic() > end:
                raise TimeoutError(f"rank {other} did not take part in a collective for {TIMEOUT_S:.0f} s")
            if _is_readable(process, SLEEP_S) and counters[index] < count:
                raise ConnectionError(f"rank {other} has ended")

    def close(self) -> None:
        for process in self._others.values():
            os.close(process)
        self._counters.release()
        del self._parts
        self._memory.close()


def _is_readable(fd: int, timeout_s: float) -> bool:
    """Not by `select`, which takes no descriptors from 1024 on."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))
