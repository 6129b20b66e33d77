"""What the endpoint asks of the launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pipeline.wire.topology import WorkerId


class LauncherRequests(NamedTuple):
    """The default: there is no launcher."""

    reload: Callable[[], None] = lambda: None
    kill: Callable[[WorkerId], None] = lambda worker: None
    watch: Callable[[float], None] = lambda seconds: None  # that workers tell of their work for so long
