from __future__ import annotations

import io
import logging

import pytest

from launcher.progress import MIB, StartProgress, shown_bytes
from pipeline.process.log import ERASE
from pipeline.process.phases import LOADING, WAITING


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def open_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> Terminal:
    """In the test itself: pytest puts its own standard error in place behind the fixtures."""
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setenv("COLUMNS", str(width))
    return made


def last_line(terminal: Terminal) -> str:
    return terminal.getvalue().rpartition(ERASE)[2]


def test_a_line_with_every_workers_phase_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = open_terminal(monkeypatch, 200), Clock()
    progress = StartProgress(clock)
    progress.show("llm.0", LOADING, 0, 2000 * MIB)
    progress.show("api.0", WAITING + "the LLM", 0, 1)
    clock.now += 2
    progress.show("llm.0", LOADING, 500 * MIB, 2000 * MIB)
    told = "api.0: waiting for the LLM 0:02 · llm.0: loading weights 25% of 2.0 GiB, 250 MiB/s, 0:06 left"
    assert last_line(terminal) == told
    clock.now += 70
    progress.show("llm.0", "measuring steps", 1, 2)
    progress.on_ready("api.0")
    clock.now += 1
    progress.show("llm.0", "measuring steps", 1, 2)
    assert last_line(terminal) == "api.0: ready · llm.0: measuring steps 50%"
    progress.close()
    assert last_line(terminal) == "", "nothing of it is left"


def test_a_line_is_not_longer_than_the_terminal_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch, 40)
    progress = StartProgress()
    for index in range(8):
        progress.show(f"vit.{index}", LOADING, 1, 100 * MIB)
    assert len(last_line(terminal)) == 39
    assert "\n" not in terminal.getvalue()


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    progress = StartProgress()
    with caplog.at_level(logging.INFO):
        progress.show("api.0", WAITING + "the LLM", 0, 1)
        for done in range(1, 101):
            progress.show("vit.0", LOADING, done * MIB, 100 * MIB)
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"loading weights: {done} MiB of 100 MiB" for done in (1, 50, 100)
    ]
    assert written.getvalue() == ""


def test_sizes() -> None:
    assert (shown_bytes(5 * MIB), shown_bytes(3 * 2**29)) == ("5 MiB", "1.5 GiB")
