"""A launcher that ends in order when its parent ends, an actor of Ray, even when that is killed.

The launcher watches the parent itself. The kernel's signal at a parent's death would come once for each
thread of the actor, and a second SIGTERM means: at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Sequence

from launcher.cli import main


def run(parent: int, arguments: Sequence[str]) -> int:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        return 1
    if os.getppid() != parent:  # the parent died before
        return 1
    threading.Thread(target=_end_with, args=(descriptor,), daemon=True).start()
    return main(arguments)


def _end_with(descriptor: int) -> None:
    """Waits for the end of a process, then leaves; open requests are finished."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
