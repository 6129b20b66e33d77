"""The command that is run where there is a GPU, at tiny sizes where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import gpu_check
from tools.gpu_check import PARTS, as_markdown, run_all
from tools.gpu_parts import Machine, Row


@pytest.mark.timeout(300)
def test_the_parts_run_at_tiny_sizes(tmp_path: Path) -> None:
    """Not isolation, which needs a GPU to share; not the tests, which are skipped here."""
    rows = {}
    names = (
        "rates",
        "attention",
        "experts",
        "grouped",
        "towers",
        "delta",
        "decode",
        "prefill",
        "fidelity",
        "server",
    )
    for name in names:
        gpu_check.run_part(name, tmp_path, is_small=True)
        rows[name] = [Row(**row) for row in json.loads((tmp_path / f"{name}.rows.json").read_text())]
    assert [row.verdict for row in rows["fidelity"]] == ["met"] * 3, rows["fidelity"]
    errors = [row.verdict for row in rows["grouped"] if row.what.startswith("error")]
    assert errors == ["met"] * 9, rows["grouped"]
    assert json.loads((tmp_path / "rates.json").read_text())["copy"] != gpu_check.USUAL_RATES["copy"]
    counts = {
        "attention": 1, "experts": 1, "grouped": 18, "towers": 2, "delta": 4, "decode": 6, "prefill": 1,
        "server": 2,
    }  # fmt: skip
    for name, count in counts.items():
        shares = [row.share for row in rows[name] if row.share is not None]
        assert len(shares) == count
        assert all(share > 0 for share in shares)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_all(["rates"], tmp_path, is_small=False) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["value"] for row in report["rates"]["rows"]] == ["not run: no GPU"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert all(row["what"] in table for part in report.values() for row in part["rows"])


def test_a_part_that_fails_or_hangs_costs_its_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_check.PARTS, "environment", (PARTS["environment"][0], 0.05))
    assert run_all(["environment", "rates"], tmp_path, is_small=True) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["environment"]["error"] == "not done within 0 s"
    assert not report["rates"]["error"]
    (tmp_path / "rates.json").write_text("no JSON")
    failed = gpu_check._in_process("rates", tmp_path, True, 60)
    assert "JSONDecodeError" in failed["error"]


def test_rows_found_before_a_failure_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(machine: Machine) -> Iterator[Row]:
        yield Row("found", "1", 1.0, 0.5)
        raise RuntimeError("then it broke")

    monkeypatch.setitem(gpu_check.PARTS, "rates", (half, 10))
    with pytest.raises(RuntimeError):
        gpu_check.run_part("rates", tmp_path, is_small=True)
    assert json.loads((tmp_path / "rates.rows.json").read_text())[0]["what"] == "found"


@pytest.mark.parametrize(
    ("share", "wanted", "verdict"),
    [(0.8, 0.75, "met"), (0.7, 0.75, "missed"), (1.1, -1.2, "met"), (1.3, -1.2, "missed"), (None, 1, "")],
)
def test_verdicts(share: float | None, wanted: float, verdict: str) -> None:
    row = Row("w", "v", share, wanted, "a")
    assert row.verdict == verdict
    assert f"| {verdict} |" in as_markdown({"p": {"rows": [row._asdict()], "error": ""}})
