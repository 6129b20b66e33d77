"""Which published models a machine has memory for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from launcher.doctor.facts import Facts
from launcher.memory import GIB, PROCESSES_GIB
from pipeline.families.known_models import KNOWN_MODELS, KnownModel

CPU_CACHE_GIB = 1.0  # the KV cache's default without a GPU
GPU_OTHERS_GIB = 3.0  # activations, graphs, libraries, the pool of embeddings
GPU_SHARE = 0.9  # the default of --gpu-memory-utilization
CONTEXT = 8192  # tokens that a GPU should hold beside the weights
BITS = {"16 bits": 16.0, "int8": 8.0, "int4": 4.25}
# On GPUs: int4 has a scale of 32 bits and a zero of 8 for each 128 numbers (workers/nn/weights/at_load.py).
GPU_BITS = {"16 bits": 16.0, "fp8": 8.0, "int4": 4 + 40 / 128}


class Fit(NamedTuple):
    model: str
    gib: dict[str, float]  # needed, by the format of the weights
    fits: tuple[str, ...]  # formats


def weight_gib(model: KnownModel, bits: float) -> float:
    """The table of embeddings keeps 16 bits."""
    quantised = model.num_params - model.num_kept
    return (quantised * bits + model.num_kept * 16) * 1e6 / 8 / GIB


def on_cpu(facts: Facts) -> list[Fit]:
    """Without the compiled kernels weights are in 32 bits, but for quantised ones, which have at least 8
    (docs/quantization.md)."""
    has_kernels = not facts.kernels_error and not facts.torch_error
    keeps_4_bits = has_kernels and "avx2" in facts.flags
    bits = {
        "16 bits": 16.0 if has_kernels or "avx512_bf16" in facts.flags else 32.0,
        "int8": BITS["int8"],
        "int4": BITS["int4"] if keeps_4_bits else BITS["int8"],
    }
    others = PROCESSES_GIB + CPU_CACHE_GIB
    return [_fit(model, bits, others, facts.memory / GIB) for model in KNOWN_MODELS]


def on_gpus(facts: Facts) -> list[Fit]:
    """With a rank on each GPU (`--tp`)."""
    smallest = min(gpu.memory for gpu in facts.gpus) / GIB
    num_gpus = len(facts.gpus)
    room = num_gpus * (GPU_SHARE * smallest - GPU_OTHERS_GIB)
    return [_fit(model, GPU_BITS, CONTEXT * model.kv_bytes / GIB, room) for model in KNOWN_MODELS]


def _fit(model: KnownModel, bits: dict[str, float], others: float, room: float) -> Fit:
    gib = {name: weight_gib(model, count) + others for name, count in bits.items()}
    return Fit(model.name, gib, tuple(name for name, needed in gib.items() if needed <= room))


def largest(fits: Sequence[Fit], kind: str) -> str:
    """The largest model that fits in this format; empty if none does."""
    return next((fit.model for fit in reversed(fits) if kind in fit.fits), "")
