"""OpenMP's threads, one on each core.

Linux may leave two threads of a team on one core for seconds: each is woken by the other, beside it, and one
of them sleeps whenever the cores are balanced. Such a step takes three times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

LIBRARY = "libgomp"
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def spread_threads(cores: Sequence[int]) -> bool:
    """Binds the threads that compute for the calling thread, itself the first, to one core each. They must
    be as many as `cores`. False where another library than GNU's starts them."""
    libraries = _openmp()
    for library in libraries:

        def bind(_: object, library: ctypes.CDLL = library) -> None:
            with contextlib.suppress(OSError):  # a core that has been taken from this process meanwhile
                os.sched_setaffinity(0, {cores[library.omp_get_thread_num()]})

        library.GOMP_parallel(_Body(bind), None, len(cores), 0)
    return bool(libraries)


@cache
def _openmp() -> tuple[ctypes.CDLL, ...]:
    """Those that are loaded: each keeps threads of its own."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return tuple(ctypes.CDLL(path) for path in sorted(paths) if Path(path).name.startswith(LIBRARY))
