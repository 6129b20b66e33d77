"""A word before the start where a model's weights leave this machine no memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from launcher.picture_size import DRIVERS
from launcher.stored_weights import weight_bytes
from pipeline.config import Config
from pipeline.families.quantization import stored_quantization
from pipeline.process.machine import machine_memory

logger = logging.getLogger(__name__)
GIB = 1 << 30
PROCESSES_GIB = 1.0  # what all processes take beside weights and KV cache


def warn_of_memory(
    config: Config, folder: Path, memory: int | None = None, drivers: Sequence[Path] = DRIVERS
) -> None:
    """Where ViT and LLM compute on the CPU: their weights are in the machine's memory, in the checkpoint's
    16 bits, or as they are quantised in its files. `memory`: in bytes, of this machine if not given."""
    is_quantized = config.llm.quantization != "none"
    may_have_gpu = config.model.device != "cpu" and any(driver.exists() for driver in drivers)
    if is_quantized or may_have_gpu:
        return
    # With several groups of ranks each has the decoder's weights.
    weights = config.llm.dp * weight_bytes(folder) / GIB
    total = (machine_memory() if memory is None else memory) / GIB
    if weights + PROCESSES_GIB > total:
        remedy = "try --quantization int8, which halves them, or int4"
        if stored_quantization(folder) is not None:
            remedy = "take files of fewer bits, or a smaller model"
        logger.warning(
            "the weights take %.1f GiB and the processes about %.0f, the machine has %.1f: if a worker is "
            "killed, %s (python -m launcher.doctor says which models fit)",
            weights, PROCESSES_GIB, total, remedy,
        )  # fmt: skip
