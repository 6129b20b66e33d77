"""What engines have in common that encode frames of one size as a batch: onnxruntime and TensorRT, from one ONNX file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from workers.nn.layers import rotary_tables
from workers.vit.deadlines import Deadlines, encoder_flop
from workers.vit.engines.torch import EncodeJob
from workers.vit.models.qwen2_vl import patchify, rotary_angles


class BatchEngine(ABC):
    """`dtype` is that of the file, and so of its embeddings; work goes to a stream of its own on a GPU.

    No sign of life comes out of a run: `deadlines` are told beforehand how much there is to do.
    """

    def __init__(self, info: VisionInfo, dtype: torch.dtype, device: torch.device, deadlines: Deadlines | None = None) -> None:
        self.info, self._dtype, self._device, self._deadlines = info, dtype, device, deadlines
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @abstractmethod
    def _run(self, patches: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """Fills out [frames, num_patches / merge², hidden]; the inputs are contiguous, and those of the ONNX file."""

    def _most_frames(self, num_patches: int) -> int:
        """How many frames of so many patches one run may hold."""
        return 1 << 16

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. When it returns the device is done with them, so handles may be sent."""
        with self._deadline(jobs):
            if self._stream is None:
                self._encode(jobs)
                return
            with torch.cuda.stream(self._stream):
                self._encode(jobs)
            self._stream.synchronize()

    def _deadline(self, jobs: Sequence[EncodeJob]) -> AbstractContextManager[None]:
        if self._deadlines is None:
            return nullcontext()
        return self._deadlines.around(sum(job.grid_thw.t * encoder_flop(self.info, job.grid_thw.h * job.grid_thw.w) for job in jobs))

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
            most = self._most_frames(grid.num_patches)
            for part, part_out in zip(patches.split(most), out.split(most), strict=True):
                self._run(part.contiguous(), cos.contiguous(), sin.contiguous(), part_out)
            if not is_direct:
                for job, part in zip(group, out.flatten(0, 1).split([len(job.output) for job in group]), strict=True):
                    job.output.copy_(part)
