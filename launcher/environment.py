"""The folders in which the launcher may keep files, and its workers' environment.

A container often has no home folder, a user without a name, and a long path for temporary files. None of that
stops a start; an error names the option that helps. Nothing here reads the environment: it is an argument.
"""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.wire.topology import MAX_IPC_PATH

logger = logging.getLogger(__name__)
MAX_SOCKET_NAME = 28  # characters: an edge with its rank and epoch, or a socket of the MPS daemon
BRIEF_CACHE = "vlm-cache"  # in the run directory, and removed with it
OWN_RUN_DIR = len("/vlm-12345678/")
MAX_BASE = MAX_IPC_PATH - OWN_RUN_DIR - MAX_SOCKET_NAME
NAMES_OF_USER = (
    "LOGNAME",
    "USER",
    "LNAME",
    "USERNAME",
)  # where getpass.getuser looks before it asks the system
# Variables that tell clients of hubs where to keep files.
PLACES_OF_HUBS = ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE", "XDG_CACHE_HOME")

UCX_OVER_TCP = {
    "UCX_TCP_TX_SEG_SIZE": "1m",
    "UCX_TCP_RX_SEG_SIZE": "1m",
    "UCX_TCP_SNDBUF": "4m",
    "UCX_TCP_RCVBUF": "4m",
}


def _entry_home() -> str:
    return pwd.getpwuid(os.getuid()).pw_dir


def _entry_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def can_make(folder: Path) -> bool:
    """Whether this process may write in the folder, or create it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def home_folder(environment: Mapping[str, str], entry_home: Callable[[], str] = _entry_home) -> Path | None:
    """The user's home; None where there is none in which this process may write."""
    named = environment.get("HOME")
    if named is None:
        try:
            named = entry_home()
        except KeyError:  # a uid without an entry in the user database
            return None
    home = Path(named)
    return home if home.is_absolute() and home.is_dir() and can_make(home) else None


def cache_folder(option: str, environment: Mapping[str, str], home: Path | None, run_dir: Path) -> Path:
    """Where exported and built encoders are kept. Raises ValueError if `option` names an unusable folder."""
    if option:
        if not can_make(Path(option)):
            raise ValueError(f"cache_dir {option!r} cannot be written")
        return Path(option).absolute()
    named = Path(environment.get("XDG_CACHE_HOME", ""))
    for base in (named if named.is_absolute() else None, home and home / ".cache"):
        if base is not None and can_make(base / "vlm-pipeline"):
            return base / "vlm-pipeline"
    logger.info("no home folder: encoders are kept until the end only; --cache-dir names one that lasts")
    return run_dir / BRIEF_CACHE


def run_dir_base(environment: Mapping[str, str], temporary: Path) -> Path:
    """Where a run directory is created. Raises ValueError where every path is too long for sockets in it."""
    runtime = Path(environment.get("XDG_RUNTIME_DIR", ""))
    places: Sequence[Path] = (*([runtime] if runtime.is_absolute() else []), temporary, Path("/tmp"))
    for base in places:
        if len(os.fsencode(base)) <= MAX_BASE and os.access(base, os.W_OK | os.X_OK):
            return base
    tried = ", ".join(map(str, dict.fromkeys(places)))
    raise ValueError(
        f"no place for a run directory: of {tried} none can be written and has at most {MAX_BASE} bytes, "
        "as the names of sockets need; set TMPDIR to a shorter one, or give --run-dir"
    )


def workers_environment(
    ours: Mapping[str, str],
    home: Path | None,
    cache: Path,
    entry_name: Callable[[], str] = _entry_name,
) -> dict[str, str]:
    """`ours`, and what a process must set before it starts.

    Huge pages for large blocks: fewer TLB misses while weights are read, and some page faults for a large
    activation instead of ten thousand. The spin count of OpenMP threads: on a core that another process
    needs, spinning costs whole scheduler ticks; a thread that sleeps at once is woken hundreds of times a
    step. The count bridges two operations of a step, some ten microseconds. One thread for NumPy's library,
    which starts its threads when it is loaded; each worker sets its own number later.

    UCX (which NIXL uses between nodes) sends pieces of 8 KiB over tcp, if nobody says otherwise: a thread is
    woken for each at both ends.

    Without a home, or a user's name, libraries that keep compiled kernels (Triton, torch, the driver) fail
    or write into the working directory: the cache folder becomes their home, and the uid the name.
    """
    tunables, users = "glibc.malloc.hugetlb=1", ours.get("GLIBC_TUNABLES")
    inherited = {name: value for name, value in ours.items() if name != "OMP_WAIT_POLICY"}
    if home is None:
        inherited["HOME"] = str(cache)
    if not any(inherited.get(name) for name in NAMES_OF_USER):
        try:
            entry_name()
        except KeyError:
            inherited["USER"] = f"uid{os.getuid()}"
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        **UCX_OVER_TCP,
        **inherited,
        "GLIBC_TUNABLES": f"{tunables}:{users}" if users else tunables,
        "GOMP_SPINCOUNT": "10000",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
