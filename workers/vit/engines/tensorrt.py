"""The TensorRT engine: built from our ONNX file once for each GPU model, kept in the user's cache, its
outputs bound to the embedding pool.

Takes TensorRT 11 (`tensorrt`), or TensorRT-RTX (`tensorrt_rtx_bindings`), which has the same interface and
builds on machines without a GPU. Networks are strongly typed: they compute in the types of the file.
Execution was never run on a GPU so far: tests build the real encoder, and use a fake engine for the rest.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from workers.nn.loader import Progress
from workers.vit.deadlines import Deadlines
from workers.vit.engines.batch import BatchEngine
from workers.vit.engines.onnx import OUTPUT, locked, unfinished
from workers.vit.models.base import Preparation, Range

logger = logging.getLogger(__name__)
MODULES = ("tensorrt", "tensorrt_rtx_bindings")
FILE = "encoder.engine"
WORKSPACE_BYTES = 2 << 30
MANY, SMALL = 16, 1024  # frames of a run, when each has at most so many patches


class Profile(NamedTuple):
    """The sizes of an optimization profile."""

    frames: Range
    patches: Range


def load_tensorrt() -> Any:
    """The module. Raises ImportError when neither is installed."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = error
    raise ImportError(f"neither {' nor '.join(MODULES)} can be imported: {reason}")


def profiles_for(info: VisionInfo) -> tuple[Profile, ...]:
    """One for many small frames, one for few large ones: memory grows with the product of the largest
    axes."""
    least = info.merge_size**2
    largest = -(-info.largest_pixels // (least * info.patch_size**2)) * least  # whole tokens
    if largest <= SMALL:
        return (Profile(Range(1, 4, MANY), Range(least, min(256, largest), largest)),)
    return (
        Profile(Range(1, 4, MANY), Range(least, 256, SMALL)),
        Profile(Range(1, 1, 2), Range(least, min(4096, largest), largest)),
    )


def build(
    trt: Any, file: Path, preparation: Preparation, progress: Progress, capability: Any = None
) -> bytes:  # fmt: skip
    """Builds the ONNX file for this machine's GPU, or (TensorRT-RTX only) for a compute capability.

    Raises RuntimeError.
    """
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT cannot read the encoder: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.progress_monitor = _monitor(trt, progress)
    if capability is not None:
        config.num_compute_capabilities = 1
        _check(config.set_compute_capability(capability, 0), "set_compute_capability")
    for wanted in profiles_for(preparation.info):
        profile = builder.create_optimization_profile()
        ranges = preparation.sizes(wanted.frames, wanted.patches)
        corners = [dict(zip(ranges, sizes, strict=True)) for sizes in zip(*ranges.values(), strict=True)]
        for spec in preparation.specs:
            profile.set_shape(spec.name, *(spec.shape(sizes) for sizes in corners))
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"TensorRT refuses the sizes {wanted}")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError("TensorRT cannot build an engine of the encoder")
    return bytes(serialized)


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases[phase_name] = (step + 1, self._phases[phase_name][1])
            progress(*next(iter(self._phases.values())))  # of the outermost phase
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

    return Monitor()


def built(
    trt: Any, preparation: Preparation, file: Path, gpu: str, cache: Path, progress: Progress,
    capability: Any = None,
) -> Path:  # fmt: skip
    """The engine of an exported file, built now if it is not in the cache yet; other processes wait
    meanwhile.

    Engines contain code: they are read from the user's own folder only.
    """
    profiles = profiles_for(preparation.info)
    # The name of the file's folder is a hash.
    what = json.dumps([trt.__name__, trt.__version__, gpu, file.parent.name, profiles, WORKSPACE_BYTES])
    place = cache / "tensorrt" / hashlib.sha256(what.encode()).hexdigest()[:32]
    with locked(place, progress):
        if not (place / FILE).exists():
            logger.info("building the TensorRT engine in %s: this takes minutes, once", place)
            with unfinished(place) as draft:
                (draft / FILE).write_bytes(build(trt, file, preparation, progress, capability))
    return place / FILE


class TensorRtEngine(BatchEngine):
    def __init__(
        self, trt: Any, preparation: Preparation, engine: bytes, dtype: torch.dtype, device: torch.device,
        deadlines: Deadlines | None = None,
    ) -> None:  # fmt: skip
        """Raises RuntimeError for an engine that is not for this machine."""
        super().__init__(preparation, dtype, device, deadlines)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise RuntimeError("TensorRT cannot load the engine on this GPU")
        self._profiles = profiles_for(preparation.info)
        self._contexts: list[Any] = []
        for index in range(len(self._profiles)):
            context = self._engine.create_execution_context()
            if context is None:
                raise RuntimeError("TensorRT has not enough memory for the engine")
            _check(
                context.set_optimization_profile_async(index, self._stream_handle),
                "set_optimization_profile_async",
            )
            self._contexts.append(context)

    @property
    def _stream_handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _max_frames(self, num_patches: int) -> int:
        return self._profiles[self._profile(num_patches)].frames.most

    def _profile(self, num_patches: int) -> int:
        found = next(
            (index for index, profile in enumerate(self._profiles) if num_patches <= profile.patches.most),
            None,
        )
        if found is None:
            raise RuntimeError(
                f"the engine is for frames of at most {self._profiles[-1].patches.most} patches, this has "
                f"{num_patches}"
            )
        return found

    def _run(self, tensors: Mapping[str, Tensor], num_patches: int, out: Tensor) -> None:
        context = self._contexts[self._profile(num_patches)]
        for name, tensor in tensors.items():
            _check(
                context.set_input_shape(name, tuple(tensor.shape)),
                f"set_input_shape {name} {tuple(tensor.shape)}",
            )
            _check(context.set_tensor_address(name, tensor.data_ptr()), "set_tensor_address")
        if (shape := tuple(context.get_tensor_shape(OUTPUT))) != tuple(out.shape):
            raise RuntimeError(f"TensorRT would yield {shape}, not {tuple(out.shape)}")
        _check(context.set_tensor_address(OUTPUT, out.data_ptr()), "set_tensor_address")
        _check(context.execute_async_v3(self._stream_handle), "execute_async_v3")


def _check(is_done: bool, call: str) -> None:
    """Raises RuntimeError: TensorRT only returns False, and would use the last valid shape or address."""
    if not is_done:
        raise RuntimeError(f"TensorRT's {call} failed")
