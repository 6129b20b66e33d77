"""Pages of 2 MiB for memory that is read again and again: with small ones a tenth of the time goes into
finding pages. Linux only; elsewhere, and where the system has none, nothing happens."""

from __future__ import annotations

import ctypes
import sys

PAGE = 4096
HUGEPAGE, COLLAPSE = 14, 25  # of Linux' madvise; the second one since 6.1


def advise(address: int, num_bytes: int) -> None:
    """The memory gets huge pages as it is first touched."""
    _madvise(address, num_bytes, HUGEPAGE)


def collapse(address: int, num_bytes: int) -> None:
    """The memory, which is in use, is moved to huge pages."""
    _madvise(address, num_bytes, HUGEPAGE)
    _madvise(address, num_bytes, COLLAPSE)


def _madvise(address: int, num_bytes: int, advice: int) -> None:
    start, stop = -(-address // PAGE) * PAGE, (address + num_bytes) // PAGE * PAGE
    if sys.platform == "linux" and start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
