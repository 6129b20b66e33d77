"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(work: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The first result of `work` that counts as true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if result := work():
            return result
        time.sleep(0.01)
    raise AssertionError("it did not happen")
