"""Chooses the engine that encodes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pipeline.adapters import Adapter
from pipeline.adapters.files import TOWER
from pipeline.adapters.served import check_engine
from pipeline.families import ModelInfo
from pipeline.wire.base import GridTHW
from workers.nn.loader import Progress
from workers.nn.weights.adapters import AdapterSet
from workers.nn.weights.registry import open_weights
from workers.vit.deadlines import Deadlines
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.registry import tower_of
from workers.vit.slices import SliceLimit

logger = logging.getLogger(__name__)


class VitEngine(Protocol):
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. On return the device is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """The arguments of an engine."""

    info: ModelInfo
    folder: Path
    dtype: torch.dtype
    device: torch.device
    num_threads: int
    cache: Path
    progress: Progress
    limit: SliceLimit
    quantization: str = "none"  # of the weights; for the engine torch
    activations: str = "auto"  # what quantised weights are multiplied by; for the engine torch
    adapters: Sequence[Adapter] = ()  # by number; those of the tower are for the engine torch
    after_work: Callable[[], object] | None = None  # for the engine that can report progress (torch)
    is_hurried: Callable[[], bool] = lambda: False  # for the same: to report it after short blocks
    deadlines: Deadlines | None = None  # for engines that cannot

    @property
    def needs_torch(self) -> bool:
        """Whether no ONNX file has what is to be computed."""
        return self.quantization != "none" or any(adapter.adapts_tower for adapter in self.adapters)


def warm_up(engine: VitEngine, spec: EngineSpec, max_patches: int) -> None:
    """Encodes a full batch, so that memory is allocated and kernels are chosen before the first request."""
    vision = spec.info.vision
    merge, side = vision.merge_size, vision.patch_size
    max_patches = min(max_patches, vision.max_pixels // side**2)
    columns = max(merge, max_patches // (16 * merge) * merge)
    rows = max(merge, max_patches // columns // merge * merge)
    grid = GridTHW(1, rows, columns)
    pixels = torch.zeros(1, rows * side, columns * side, 3, dtype=torch.uint8, device=spec.device)
    shape = vision.num_tokens(grid), vision.embedding_width
    output = torch.empty(shape, dtype=spec.dtype, device=spec.device)
    engine.encode([EncodeJob(pixels, grid, output)])


def choose_engine(name: str, spec: EngineSpec) -> VitEngine:
    """On a GPU `auto` is TensorRT if it imports and builds, else onnxruntime if its CUDA provider loads, else
    torch; on the CPU, for quantised weights and for adapters of the tower it is torch.

    Raises ValueError when the named engine is not available.
    """
    if spec.quantization != "none" and name not in ("auto", "torch"):
        raise ValueError(
            f"vit_engine {name!r} computes dense weights, not {spec.quantization}: take torch, or "
            "--vit-quantization none"
        )
    check_engine(name, spec.adapters)
    if name != "auto":
        engine = ENGINES[name](spec)
        logger.info("ViT engine: %s (asked for)", name)
        return engine
    reasons: list[str] = []
    for better in ("tensorrt", "onnxruntime") if spec.device.type == "cuda" and not spec.needs_torch else ():
        try:
            engine = ENGINES[better](spec)
        except (ImportError, ValueError, RuntimeError) as error:
            reasons.append(f"{better} cannot: {error}")
        else:
            logger.info("ViT engine: %s (%s)", better, "; ".join(reasons) or "the first choice on a GPU")
            return engine
    logger.info("ViT engine: torch (%s)", "; ".join(reasons) or "the processor computes best with it")
    return _torch(spec)


def _torch(spec: EngineSpec) -> VitEngine:
    tower = tower_of(spec.info)
    adapters = None
    if any(adapter.adapts_tower for adapter in spec.adapters):
        adapters = AdapterSet(
            spec.adapters, lambda module: module.startswith(TOWER), spec.dtype, spec.device
        )  # fmt: skip
    weights = open_weights(
        spec.folder, spec.dtype, spec.device, spec.quantization, spec.progress, adapters=adapters,
        activations=spec.activations,
    )  # fmt: skip
    weights.expect(tower.prefix)
    encoder = tower.encoder(spec.info.vision, weights)
    engine = TorchEngine(encoder, spec.limit, spec.after_work, spec.is_hurried, adapters)
    weights.close()
    if adapters is not None:
        adapters.check_all_loaded()
    return engine


def _onnxruntime(spec: EngineSpec) -> VitEngine:
    _need("onnxruntime", "onnxruntime", "onnxscript")
    from workers.vit.engines.onnx import exported
    from workers.vit.engines.onnxruntime import OnnxRuntimeEngine

    dtype = spec.dtype
    if spec.device.type == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32  # onnxruntime has no bfloat16 on the CPU; the pool keeps the model's type
    file = exported(spec.info, spec.folder, dtype, spec.cache, spec.progress)
    preparation = tower_of(spec.info).preparation(spec.info.vision)
    return OnnxRuntimeEngine(preparation, file, dtype, spec.device, spec.num_threads, spec.deadlines)


def _tensorrt(spec: EngineSpec) -> VitEngine:
    if spec.device.type != "cuda":
        raise ValueError("vit_engine 'tensorrt' needs a GPU")
    if spec.dtype == torch.float32:
        raise ValueError(
            "vit_engine 'tensorrt' has no attention for float32: take --dtype bfloat16 or float16"
        )
    _need("tensorrt", "onnxscript")
    from workers.vit.engines.onnx import exported
    from workers.vit.engines.tensorrt import TensorRtEngine, built, load_tensorrt

    try:
        trt = load_tensorrt()
    except ImportError as error:
        raise ValueError(f"vit_engine 'tensorrt': {error}") from None
    file = exported(spec.info, spec.folder, spec.dtype, spec.cache, spec.progress)
    properties = torch.cuda.get_device_properties(spec.device)
    gpu = f"{properties.name} {properties.major}.{properties.minor} {properties.multi_processor_count}"
    preparation = tower_of(spec.info).preparation(spec.info.vision)
    with torch.cuda.device(spec.device):
        engine = built(trt, preparation, file, gpu, spec.cache, spec.progress).read_bytes()
        return TensorRtEngine(trt, preparation, engine, spec.dtype, spec.device, spec.deadlines)


# By the option `--vit-engine`.
ENGINES: Mapping[str, Callable[[EngineSpec], VitEngine]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
}


def _need(engine: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"vit_engine {engine!r} needs the package {module}: install vlm-pipeline[cpu] or [gpu]; "
                "python -m launcher.doctor says which others are missing"
            )
