"""The rate at which all cores together read memory: what a step that is bound by its weights is measured by.

    python -m tools.memory_rate

The best of five reads of 1 GiB by all threads, with whichever of the kernels is the fastest: sums of torch in
three types, a matrix times a vector, and, with a thread for each core, libc's search for a byte, its
comparison of two halves, and numpy's sum. The buffer asks for huge pages. Machines drift: measure the rate in
the run whose figures it is to judge.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

GIB = 1 << 30
REPEATS = 5
ROW = 4096  # float32 in a row of the matrix


class MemoryRate(NamedTuple):
    bytes_per_s: float
    kernel: str  # the one that reached it


class Buffer:
    """Memory of which no two pages are one, without the byte 0."""

    def __init__(self, nbytes: int, num_threads: int) -> None:
        self._map = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(self._map, np.uint8)
        # 1.4 as float32, and no exponent that makes sums slow.
        self.array.view(np.uint32)[:] = 0x3FB33333
        self.tensor = torch.from_numpy(self.array)
        self._pool = ThreadPoolExecutor(num_threads)
        self._num_threads = num_threads

    def in_threads(self, read: Callable[[np.ndarray[Any, Any]], object]) -> None:
        """`read` of an equal part in each thread. It must not hold Python's lock."""
        list(self._pool.map(read, np.array_split(self.array, self._num_threads)))


def find_zero(part: np.ndarray[Any, Any]) -> None:
    """libc's memchr, for a byte that is not there."""
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memchr.restype = ctypes.c_void_p
    assert libc.memchr(part.ctypes.data, 0, part.nbytes) is None


def compare_halves(part: np.ndarray[Any, Any]) -> None:
    """libc's memcmp, of halves that are the same."""
    libc = ctypes.CDLL(None)
    libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    half = part.nbytes // 2
    assert libc.memcmp(part.ctypes.data, part.ctypes.data + half, half) == 0


def add_numbers(part: np.ndarray[Any, Any]) -> None:
    part.view(np.uint64).sum()


def kernels(buffer: Buffer) -> Mapping[str, Callable[[], object]]:
    """By name: each reads the whole buffer once."""
    floats = buffer.tensor.view(torch.float32)
    matrix, vector = floats.view(-1, ROW), torch.ones(ROW)
    found: dict[str, Callable[[], object]] = {
        "torch.sum float32": floats.sum,
        "torch.sum float64": buffer.tensor.view(torch.float64).sum,
        "torch.sum int64": buffer.tensor.view(torch.int64).sum,
        "torch.mv float32": lambda: torch.mv(matrix, vector),
        "numpy.sum uint64": lambda: buffer.in_threads(add_numbers),
    }
    if os.name == "posix":
        found["memchr"] = lambda: buffer.in_threads(find_zero)
        found["memcmp"] = lambda: buffer.in_threads(compare_halves)
    return found


def kernel_rates(nbytes: int = GIB, repeats: int = REPEATS) -> dict[str, float]:
    """Bytes/s of each kernel, the best of its repeats; by torch's number of threads."""
    buffer = Buffer(nbytes, torch.get_num_threads())
    calls = kernels(buffer)
    best = dict.fromkeys(calls, 0.0)
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first one starts threads
                best[name] = max(best[name], nbytes / (time.perf_counter() - start))
    return best


def memory_rate(nbytes: int = GIB, repeats: int = REPEATS) -> MemoryRate:
    rates = kernel_rates(nbytes, repeats)
    kernel = max(rates, key=rates.__getitem__)
    return MemoryRate(rates[kernel], kernel)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: as many as cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = kernel_rates()
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"{name:20} {rate / 1e9:6.1f} GB/s")


if __name__ == "__main__":
    main()
