"""Rounds of the comparison: who takes part and in which order; and one with our server alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_peers import choose, read_turns, turned, write_turns
from tools.peers.adapters import Ours, Peer, Vllm
from tools.peers.figures import Figure, Turn

OURS, INT8, ABSENT = Ours(), Ours("int8"), Vllm("/no/python")


def test_the_order_moves_by_one_each_round() -> None:
    peers: list[Peer] = [OURS, INT8, ABSENT]
    assert [turned(peers, number)[0] for number in range(4)] == [OURS, INT8, ABSENT, OURS]
    assert set(turned(peers, 2)) == set(peers)


def test_who_is_not_installed_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose([OURS, INT8, ABSENT], []) == [OURS, INT8]
    assert capsys.readouterr().out == "vllm is left out: there is no /no/python\n"
    assert choose([OURS, INT8, ABSENT], ["ours"]) == [OURS]
    with pytest.raises(ValueError, match="unknown: them"):
        choose([OURS], ["them"])


def test_turns_are_kept_between_runs(tmp_path: Path) -> None:
    path = tmp_path / "turns.json"
    assert read_turns(path) == []
    figures = {"prefill": Figure(12.5, 0.01), "start": Figure(None, 0.2)}
    turns = [Turn(peer="ours", round=1, figures=figures, memory_rate=2e10)]
    write_turns(path, turns)
    assert read_turns(path) == turns


def test_a_run_with_our_server_alone(tmp_path: Path) -> None:
    """Any share of others is taken: tests run beside each other."""
    command = [
        sys.executable, "-m", "tools.bench_peers", "--shape", "tiny", "--servers", "ours", "--rounds", "1",
        "--parts", "prefill", "decode8", "--output-tokens", "4", "--repeats", "1", "--max-others", "2",
        "--docs", str(tmp_path), "--json", str(tmp_path / "turns.json"), "--lock", str(tmp_path / "lock"),
        "--block-size", "16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (turn,) = json.loads((tmp_path / "turns.json").read_text())
    assert turn["error"] == ""
    assert turn["figures"].keys() == {"start", "prefill", "decode8", "memory", "peak"}
    assert all(value > 0 for value, _ in turn["figures"].values())
    assert "| decode, 8 streams, tokens/s |" in (tmp_path / "peers-tiny.md").read_text()
    assert (tmp_path / "peers-tiny.svg").is_file()
