"""The onnxruntime engine, on the CPU or a GPU: frames of one size as a batch, written straight into the embedding pool.

On a GPU never run so far: tests run the same code on the CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from pipeline.families import VisionInfo
from workers.nn.layers import rotary_tables
from workers.vit.engines.onnx import INPUTS, OUTPUT
from workers.vit.engines.torch import EncodeJob
from workers.vit.models.qwen2_vl import patchify, rotary_angles

ELEMENT_TYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: 16}  # 16: ONNX's number for bfloat16


class OnnxRuntimeEngine:
    """`dtype` is that of the file, and so of its embeddings."""

    def __init__(self, info: VisionInfo, file: Path, dtype: torch.dtype, device: torch.device, num_threads: int) -> None:
        """Raises RuntimeError where a GPU is wanted and onnxruntime's CUDA provider does not load."""
        self.info, self._dtype, self._device = info, dtype, device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are others' too
        options.log_severity_level = 3
        self._stream: torch.cuda.Stream | None = None
        provider: Any = "CPUExecutionProvider"
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            provider = ("CUDAExecutionProvider", {
                "device_id": device.index, "has_user_compute_stream": "1", "user_compute_stream": str(self._stream.cuda_stream),
                "arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0",
            })  # fmt: skip
        self._session = onnxruntime.InferenceSession(file, options, providers=[provider])
        if device.type == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeError("onnxruntime has no CUDA provider that loads")

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. When it returns the device is done with them, so handles may be sent."""
        if self._stream is None:
            self._encode(jobs)
            return
        with torch.cuda.stream(self._stream):
            self._encode(jobs)
        self._stream.synchronize()

    def _encode(self, jobs: Sequence[EncodeJob]) -> None:
        alike: dict[tuple[int, int], list[EncodeJob]] = defaultdict(list)
        for job in jobs:
            alike[job.grid_thw.h, job.grid_thw.w].append(job)
        for group in alike.values():
            grid = group[0].grid_thw._replace(t=1)
            patches = torch.cat([patchify(job.pixels.to(self._device), self.info) for job in group]).unflatten(0, (-1, grid.num_patches))
            cos, sin = rotary_tables(rotary_angles(grid, self.info).to(self._device), torch.float32)
            shape = (len(patches), grid.num_patches // self.info.merge_size**2, self.info.hidden_size)
            # One job's output is one block of the pool: it is written there and nowhere else.
            is_direct = len(group) == 1 and group[0].output.dtype == self._dtype and group[0].output.is_contiguous()
            out = group[0].output.view(shape) if is_direct else torch.empty(shape, dtype=self._dtype, device=self._device)
            self._run((patches, cos, sin), out)
            if not is_direct:
                for job, part in zip(group, out.flatten(0, 1).split([len(job.output) for job in group]), strict=True):
                    job.output.copy_(part)

    def _run(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        binding = self._session.io_binding()
        inputs = [tensor.contiguous() for tensor in inputs]
        for name, tensor in zip(INPUTS, inputs, strict=True):
            binding.bind_input(name, self._device.type, self._device.index or 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(OUTPUT, self._device.type, self._device.index or 0, ELEMENT_TYPES[self._dtype], tuple(out.shape), out.data_ptr())
        self._session.run_with_iobinding(binding)
