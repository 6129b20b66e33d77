from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tools.bench_guesses import Decoding, report, report_served, share_to_pay
from tools.random_checkpoint import make_checkpoint
from tools.random_checkpoint.agreeing import make_agree


def test_the_share_that_pays_is_where_a_step_yields_what_it_costs() -> None:
    assert share_to_pay(1.5, 1) == pytest.approx(0.5)
    assert share_to_pay(1.75, 2) == pytest.approx(0.5)
    assert share_to_pay(1.0, 3) == pytest.approx(0.0, abs=1e-9)
    assert share_to_pay(2.1, 1) is None


def test_steps_with_guesses_and_without_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far from the figures that the tool prints."""
    make_checkpoint(tmp_path, "qwen3.5-tiny")
    decoding = Decoding(tmp_path, "float32", num_sequences=2, context=70, num_steps=15)
    report(decoding, [1, 3], num_steps=2)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["0", "1", "3"]
    without, with_head = (decoding._runners[has_head] for has_head in (False, True))
    assert without.sequences.lengths[:2].tolist() == [75, 75]
    assert min(with_head.sequences.lengths[:2]) >= 80


def test_servers_with_guesses_and_without_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path, "qwen3.5-tiny")
    make_agree(tmp_path, 0.02)
    report_served(tmp_path, Namespace(dtype="float32", sequences=2, guesses=[3], output_tokens=24))
    without, guessing = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert (without[1], without[-1]) == ("-", "yes")
    assert int(guessing[1].rstrip("%")) > 30
    assert guessing[-1] == "yes"
