"""Whose time is whose, and when a figure is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tools.peers.usage import (
    CpuTime,
    Moment,
    PeakMemory,
    ProcessStat,
    all_stats,
    held_bytes,
    look,
    parse_cores,
    parse_stat,
    tree_of,
    use_between,
)

HZ = os.sysconf("SC_CLK_TCK")


def test_a_process_is_read_behind_any_name() -> None:
    line = f"7 (a) b (c) S 3 5 6 0 -1 0 0 0 0 0 {HZ} {2 * HZ} {3 * HZ} {4 * HZ} 20 0 1"
    assert parse_stat(line) == ProcessStat(parent=3, session=6, seconds=10.0)


def test_idle_time_and_waiting_are_not_busy() -> None:
    line = f"cpu  {HZ} {2 * HZ} {3 * HZ} {1000 * HZ} {50 * HZ} {4 * HZ} {5 * HZ} {6 * HZ} 0 0\n"
    assert parse_cores(line) == CpuTime(busy=15.0, stolen=6.0)


def use(own: float, busy: float, stolen: float = 0.0, seconds: float = 10.0) -> tuple[float, bool]:
    """The share of others on two cores, and whether it is refused at 3 %."""
    before = Moment(5.0, CpuTime(100.0, 7.0), 40.0)
    after = Moment(5.0 + seconds, CpuTime(100.0 + busy, 7.0 + stolen), 40.0 + own)
    found = use_between(before, after, 2)
    return found.others_share, found.is_refused(0.03)


@pytest.mark.parametrize(
    ("own", "busy", "stolen", "share", "is_refused"),
    [
        (18.0, 18.5, 0.0, 0.025, False),
        (18.0, 18.7, 0.0, 0.035, True),
        (18.0, 18.0, 0.7, 0.035, True),  # the host took it
        (18.1, 18.0, 0.0, 0.0, False),  # the kernel's two clocks differ
        (0.0, 20.0, 0.0, 1.0, True),
    ],
)
def test_a_figure_is_refused_where_others_had_more_than_their_share(
    own: float, busy: float, stolen: float, share: float, is_refused: bool
) -> None:
    assert use(own, busy, stolen) == (pytest.approx(share), is_refused)


def test_a_few_ticks_of_a_short_figure_are_no_reason() -> None:
    assert use(0.3, 0.33, seconds=0.2) == (pytest.approx(0.075), False)
    assert use(0.3, 0.36, seconds=0.2) == (pytest.approx(0.15), True)


def test_a_server_is_its_children_and_its_session() -> None:
    def stat(parent: int, session: int) -> ProcessStat:
        return ProcessStat(parent, session, 0.0)

    stats = {
        10: stat(1, 10), 11: stat(10, 10), 12: stat(11, 12), 13: stat(12, 13),
        14: stat(1, 10),  # its parent has ended
        20: stat(1, 20),
    }  # fmt: skip
    assert tree_of(10, stats) == {10, 11, 12, 13, 14}


def test_work_of_a_servers_child_is_its_own() -> None:
    spin = "import os, time\nif os.fork() == 0:\n while True: pass\nos.wait()"
    with subprocess.Popen([sys.executable, "-c", spin], start_new_session=True) as process:
        try:
            before = look(process.pid)
            time.sleep(0.5)
            after = look(process.pid)
            assert after.own - before.own > 0.05
            assert after.cores.busy - before.cores.busy > 0.05
            with PeakMemory().watch(process.pid):
                assert held_bytes(process.pid) > 1 << 20
        finally:
            for pid in tree_of(process.pid, all_stats()):
                os.kill(pid, 9)


def test_the_peak_is_seen_while_it_is_watched() -> None:
    peak = PeakMemory()
    with peak.watch(os.getpid()):
        time.sleep(0.5)
    assert peak.nbytes > 1 << 20
