"""A model's files on machines that the tests invent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.doctor.command import as_text
from launcher.doctor.facts import Facts
from launcher.doctor.findings import findings
from launcher.doctor.fits import on_cpu
from launcher.doctor.judged_model import judge_model
from launcher.memory import GIB
from tests.launcher.doctor.test_findings import GOOD, H200, facts


@pytest.mark.parametrize(
    ("machine", "size", "settings", "level", "words"),
    [
        (
            GOOD,
            20,
            {"quant_method": "awq"},
            "good",
            "20.0 GiB of weights, quantised by awq; the machine has room",
        ),
        (GOOD, 31, {"quant_method": "awq"}, "warning", "files of fewer bits, or a smaller model"),
        (
            GOOD,
            31,
            None,
            "warning",
            "not quantised; the machine has room for 30.0 --quantization int8 or int4",
        ),
        (facts(gpus=(H200,)), 120, {"quant_method": "fp8"}, "good", "the GPUs have room for 123.0"),
        (GOOD, 1, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "error", "as NVFP4"),
        (GOOD, 0, None, "error", "no safetensors files"),
    ],
)
def test_judged(
    machine: Facts, size: int, settings: dict[str, str] | None, level: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings} if settings else {}))
    if size:
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size * GIB)  # a hole: it takes no room
    (found,) = judge_model(tmp_path, machine)
    assert (found.level, found.topic) == (level, "model")
    assert words in f"{found.text} {found.help}"


def test_the_report_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    text = as_text(GOOD, [*findings(GOOD), *judge_model(tmp_path, GOOD)], on_cpu(GOOD))
    assert text.endswith("This model cannot be served here yet: model.\n")
    assert "is in GGUF" in text
