"""Which engine encodes, and why."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from pipeline.families import VisionInfo
from pipeline.messages import GridTHW
from workers.nn.loader import Checkpoint, Progress
from workers.vit.engines.torch import EncodeJob, TorchEngine
from workers.vit.models.qwen2_vl import VisionEncoder

logger = logging.getLogger(__name__)


class Engine(Protocol):
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. When it returns the device is done with them."""


def warm_up(engine: Engine, info: VisionInfo, dtype: torch.dtype, device: torch.device, max_patches: int) -> None:
    """Encodes as much as a batch may hold, so that memory is taken and kernels are chosen before anybody waits."""
    merge, side = info.merge_size, info.patch_size
    columns = max(merge, max_patches // (16 * merge) * merge)
    rows = max(merge, max_patches // columns // merge * merge)
    pixels = torch.zeros(1, rows * side, columns * side, 3, dtype=torch.uint8, device=device)
    output = torch.empty(rows * columns // merge**2, info.hidden_size, dtype=dtype, device=device)
    engine.encode([EncodeJob(pixels, GridTHW(1, rows, columns), output)])


def choose_engine(
    name: str, info: VisionInfo, folder: Path, dtype: torch.dtype, device: torch.device, num_threads: int, cache: Path, progress: Progress
) -> Engine:
    """`auto` is onnxruntime on a GPU where its CUDA provider loads, else torch. Raises ValueError when what is asked for is not there."""
    reason = "asked for"
    if name == "auto":
        name, reason = "torch", "the processor computes best with it"
        if device.type == "cuda":
            try:
                return _onnxruntime(info, folder, dtype, device, num_threads, cache, progress, "its CUDA provider loads")
            except (ImportError, ValueError, RuntimeError) as error:
                reason = f"onnxruntime cannot: {error}"
    if name == "onnxruntime":
        return _onnxruntime(info, folder, dtype, device, num_threads, cache, progress, reason)
    logger.info("ViT engine: torch (%s)", reason)
    checkpoint = Checkpoint(folder, dtype, device, progress)
    checkpoint.expect("visual.")
    engine = TorchEngine(info, VisionEncoder(info, checkpoint))
    checkpoint.close()
    return engine


def _onnxruntime(
    info: VisionInfo, folder: Path, dtype: torch.dtype, device: torch.device, num_threads: int, cache: Path, progress: Progress, reason: str
) -> Engine:
    for module in ("onnxruntime", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"vit_engine 'onnxruntime' needs the package {module}: install vlm-pipeline[cpu] or [gpu]")
    from workers.vit.engines.onnx import exported
    from workers.vit.engines.onnxruntime import OnnxRuntimeEngine

    if device.type == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32  # onnxruntime has no bfloat16 on the CPU; the pool keeps the model's type
    file = exported(info, folder, dtype, cache, progress)
    engine = OnnxRuntimeEngine(info, file, dtype, device, num_threads)
    logger.info("ViT engine: onnxruntime (%s)", reason)
    return engine
