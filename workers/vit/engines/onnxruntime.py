"""The onnxruntime engine, on the CPU or a GPU, its outputs bound to the embedding pool.

On a GPU never run so far: tests run the same code on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from workers.vit.deadlines import Deadlines
from workers.vit.engines.batch import BatchEngine
from workers.vit.engines.onnx import OUTPUT
from workers.vit.models.base import Preparation

# 16 is ONNX's number for bfloat16, which numpy lacks.
ELEMENT_TYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: 16, torch.int32: np.int32,
    torch.int64: np.int64, torch.bool: np.bool_,
}  # fmt: skip


class OnnxRuntimeEngine(BatchEngine):
    def __init__(
        self, preparation: Preparation, file: Path, dtype: torch.dtype, device: torch.device,
        num_threads: int, deadlines: Deadlines | None = None,
    ) -> None:  # fmt: skip
        """Raises RuntimeError where a GPU is wanted and onnxruntime's CUDA provider does not load."""
        super().__init__(preparation, dtype, device, deadlines)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are shared
        options.log_severity_level = 3
        provider: Any = "CPUExecutionProvider"
        if self._stream is not None:
            provider = ("CUDAExecutionProvider", {
                "device_id": device.index, "has_user_compute_stream": "1",
                "user_compute_stream": str(self._stream.cuda_stream),
                "arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC",
                "use_tf32": "0",
            })  # fmt: skip
        self._session = onnxruntime.InferenceSession(file, options, providers=[provider])
        if device.type == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeError("onnxruntime has no CUDA provider that loads")

    def _run(self, tensors: Mapping[str, Tensor], num_patches: int, out: Tensor) -> None:
        binding = self._session.io_binding()
        place = self._device.type, self._device.index or 0
        for name, tensor in tensors.items():
            element_type = ELEMENT_TYPES[tensor.dtype]
            binding.bind_input(name, *place, element_type, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(OUTPUT, *place, ELEMENT_TYPES[self._dtype], tuple(out.shape), out.data_ptr())
        self._session.run_with_iobinding(binding)
