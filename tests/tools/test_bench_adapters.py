from __future__ import annotations

import sys

import pytest

from tools.bench_adapters import main


def test_steps_with_adapters_and_without_take_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--shape", "tiny", "--requests", "2", "--adapters", "2", "--rank", "4", "--rounds", "2")
    monkeypatch.setattr(sys, "argv", ["bench_adapters", *options])
    main()
    steps, ratios = capsys.readouterr().out.splitlines()
    assert steps.startswith("2 requests: ")
    assert " with 2 adapters " in steps
    assert ratios.count(",") == 2
