from __future__ import annotations

import threading
import time

from pipeline.transport.poller import Poller, Wakeup


def test_a_helper_thread_wakes_a_poller() -> None:
    wakeup = Wakeup()
    poller = Poller(wakeup)
    threading.Timer(0.05, wakeup.set).start()
    start = time.monotonic()
    poller.wait(5)
    assert time.monotonic() - start < 2
    wakeup.clear()
    start = time.monotonic()
    poller.wait(0.05)
    assert time.monotonic() - start >= 0.04
    wakeup.close()
