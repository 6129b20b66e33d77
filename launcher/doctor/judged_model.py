"""What a model's files mean on a machine: whether they are served, and whether their weights have room."""

from __future__ import annotations

from pathlib import Path

from launcher.doctor.facts import Facts
from launcher.doctor.findings import Finding
from launcher.doctor.fits import CPU_CACHE_GIB, GPU_OTHERS_GIB, GPU_SHARE
from launcher.memory import GIB, PROCESSES_GIB
from launcher.stored_weights import refuse_gguf, weight_bytes
from pipeline.families.quantization import check_quantization

TOPIC = "model"


def judge_model(folder: Path, facts: Facts) -> list[Finding]:
    """`folder`: of a checkpoint; sizes are counted from its files, quantised or not."""
    try:
        refuse_gguf(str(folder), [file.name for file in folder.iterdir()] if folder.is_dir() else [])
        found = check_quantization(folder)
    except ValueError as error:
        return [Finding("error", TOPIC, str(error))]
    weights = weight_bytes(folder) / GIB
    if not weights:
        return [Finding("error", TOPIC, f"{str(folder)!r} has no safetensors files")]
    if facts.gpus:
        room = len(facts.gpus) * (GPU_SHARE * min(gpu.memory for gpu in facts.gpus) / GIB - GPU_OTHERS_GIB)
        where = "the GPUs have room for"
    else:
        room, where = facts.memory / GIB - PROCESSES_GIB - CPU_CACHE_GIB, "the machine has room for"
    stored = f"quantised by {found.method}" if found is not None else "not quantised"
    text = f"{weights:.1f} GiB of weights, {stored}; {where} {max(0.0, room):.1f}"
    if weights <= room:
        return [Finding("good", TOPIC, text)]
    instead = "files of fewer bits, or a smaller model"
    return [Finding("warning", TOPIC, text, instead if found is not None else "--quantization int8 or int4")]
