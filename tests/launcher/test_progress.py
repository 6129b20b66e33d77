from __future__ import annotations

import io
import logging

import pytest

from launcher.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_over_all_workers_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = ProgressBar()
    for done in range(1, 11):
        bar.show("vit.0", "loading weights", done, 10)
        bar.show("llm.0", "loading weights", 2 * done, 20)
    assert bar._bar.n == 30
    assert bar._bar.total == 30
    bar.close()
    assert "loading weights" in terminal.getvalue()


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    bar = ProgressBar()
    with caplog.at_level(logging.INFO):
        for done in range(1, 101):
            bar.show("vit.0", "loading weights", done, 100)
    bar.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"loading weights: {done} of 100 tensors" for done in (1, 50, 100)
    ]
