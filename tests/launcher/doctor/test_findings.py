"""What is said of machines that the tests invent."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from launcher.doctor.command import as_json, as_text
from launcher.doctor.facts import OPTIONAL, REQUIRED, Facts, Gpu
from launcher.doctor.findings import can_serve, findings
from launcher.doctor.fits import largest, on_cpu, on_gpus
from launcher.memory import GIB

AVX2 = frozenset({"avx2"})
ALL = frozenset({"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile"})
H200 = Gpu("NVIDIA H200", 140 * GIB, (9, 0))
T4 = Gpu("Tesla T4", 15 * GIB, (7, 5))
GOOD = Facts(
    flags=ALL, num_cores=8, memory=32 * GIB, available=30 * GIB, shared_memory=8 * GIB,
    cache="/home/a/.cache/vlm-pipeline", disk=100 * GIB, torch="2.13.0", compiler="g++ 12",
)  # fmt: skip


def facts(**changed: Any) -> Facts:
    return dataclasses.replace(GOOD, **changed)


def test_nothing_is_wrong_with_a_good_machine() -> None:
    found = findings(GOOD)
    assert {finding.level for finding in found} == {"good", "note"}
    assert [finding.text for finding in found if finding.level == "note"] == ["none: the CPU computes"]
    assert can_serve(found)


@pytest.mark.parametrize(("changed", "level", "words"), [
    ({"system": "Darwin"}, "error", "runs on Linux only"),
    ({"python": (3, 10)}, "error", "Python 3.11 or later"),
    ({"has_embedded": False}, "error", "embedded model's files"),
    ({"quota": 2.0}, "good", "2 of 8 cores: the container's CPU quota is 2"),
    ({"quota": 1.5}, "warning", "take turns on the core"),
    ({"num_cores": 1}, "warning", "two cores or more"),
    ({"flags": frozenset()}, "warning", "no AVX2"),
    ({"flags": AVX2}, "note", "AVX2, no AVX512-BF16: the model computes in float32"),
    ({"flags": frozenset()}, "warning", "int4 takes as much memory as int8"),
    ({}, "good", "AMX, AVX512-VNNI, AVX512-BF16, AVX512: the model computes in bfloat16"),
    ({"kernels_error": "No module", "compiler": ""}, "warning", "install g++ 10 or later"),
    ({"kernels_error": "undefined symbol: omp"}, "warning", "undefined symbol: omp"),
    ({"torch": "", "torch_error": "OSError: libcudart"}, "error", "OSError: libcudart"),
    ({"driver": "550.1"}, "warning", "torch is a build for CPUs"),
    ({"driver": "535.1", "driver_cuda": "12.2", "cuda_build": "13.0"}, "warning", "update the driver"),
    ({"driver": "580.1", "driver_cuda": "13.0", "cuda_build": "13.0"}, "warning", "CUDA_VISIBLE_DEVICES"),
    ({"has_gpu_file": True, "cuda_build": "13.0"}, "warning", "started without --gpus"),
    ({"gpus": (H200,), "cuda_build": "13.0"}, "good", "NVIDIA H200, 140 GiB, compute capability 9.0"),
    ({"gpus": (T4,), "cuda_build": "13.0"}, "good", "no bfloat16"),
    ({"gpus": (H200,), "has_mps": True}, "good", "share a GPU at once"),
    ({"gpus": (H200,)}, "note", "take turns on a GPU"),
    ({"gpus": (H200, H200), "shared_memory": 64 << 20}, "warning", "--shm-size"),
    ({"memory": 2 * GIB}, "error", "take about 2.5"),
    ({"available": 3 * GIB}, "warning", "killed for lack of it"),
    ({"cache_error": "there is no home folder"}, "note", "--cache-dir"),
    ({"disk": GIB}, "warning", "too little to download"),
    ({"missing": ["av"]}, "error", "the package av is missing"),
    ({"missing_optional": ["decord"]}, "note", "without decord: no --video-reader decord"),
])  # fmt: skip
def test_what_is_said_of_a_machine(changed: dict[str, Any], level: str, words: str) -> None:
    found = findings(facts(**changed))
    levels = {finding.level for finding in found if words in f"{finding.text} {finding.help}"}
    assert levels == {level}, found
    assert can_serve(found) == all(finding.level != "error" for finding in found)


def test_a_gpu_makes_the_cpus_instructions_uninteresting() -> None:
    found = findings(facts(gpus=(H200,), flags=frozenset(), kernels_error="not there"))
    assert not {finding.topic for finding in found} & {"instructions", "kernels"}


def test_which_models_fit() -> None:
    assert largest(on_cpu(GOOD), "16 bits") == "Qwen3.5-9B"
    assert largest(on_cpu(GOOD), "int4") == "Qwen3.5-35B-A3B"
    assert largest(on_cpu(facts(flags=AVX2)), "int4") == "Qwen3.5-35B-A3B", "AVX2 has a kernel for 4 bits"
    assert largest(on_cpu(facts(flags=frozenset())), "int4") == "Qwen3-VL-30B-A3B", "in 8 bits"
    slow = facts(flags=AVX2, kernels_error="not there")
    assert largest(on_cpu(slow), "16 bits") == "Qwen2.5-VL-7B", "in float32"
    assert largest(on_cpu(facts(memory=2 * GIB)), "int8") == ""
    assert largest(on_gpus(facts(gpus=(H200,))), "16 bits") == "Qwen3.5-35B-A3B"
    assert largest(on_gpus(facts(gpus=(H200,) * 8)), "16 bits") == "Qwen3-VL-235B-A22B"
    assert largest(on_gpus(facts(gpus=(T4,))), "16 bits") == "Qwen3-VL-4B"


def test_the_report() -> None:
    bad = facts(memory=2 * GIB, missing=["av"])
    text = as_text(bad, findings(bad), on_cpu(bad))
    assert text.endswith("The embedded model cannot be served here yet: memory, packages.\n")
    assert "  ERROR  memory:" in text
    text = as_text(GOOD, findings(GOOD), on_cpu(GOOD))
    assert text.endswith("The embedded model can be served here: python -m launcher\n")
    told = json.loads(as_json(GOOD, findings(GOOD), on_cpu(GOOD)))
    assert (told["can_serve"], told["facts"]["num_cores"]) == (True, 8)
    assert {model["model"]: model["fits"] for model in told["models"]}["Qwen3.5-35B-A3B"] == ["int4"]


def test_names_are_those_of_modules() -> None:
    assert not set(REQUIRED) & set(OPTIONAL)
