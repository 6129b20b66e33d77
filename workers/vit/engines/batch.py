"""The common part of onnxruntime and TensorRT: both run an ONNX file on batches of frames of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from workers.vit.deadlines import Deadlines
from workers.vit.models.base import EncodeJob, Preparation


class BatchEngine(ABC):
    """`dtype` is the file's, and so the embeddings'. On a GPU the engine has a stream of its own.

    A run reports no progress: it is announced to `deadlines` with its number of operations.
    """

    def __init__(
        self, preparation: Preparation, dtype: torch.dtype, device: torch.device,
        deadlines: Deadlines | None = None,
    ) -> None:  # fmt: skip
        self._preparation, self._dtype, self._device, self._deadlines = preparation, dtype, device, deadlines
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @abstractmethod
    def _run(self, tensors: Mapping[str, Tensor], num_patches: int, out: Tensor) -> None:
        """Fills out [frames, num_tokens, width] for frames of so many patches.

        `tensors` are the contiguous inputs of the ONNX file.
        """

    def _max_frames(self, num_patches: int) -> int:
        """The maximum number of frames of so many patches in one run."""
        return 1 << 16

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. On return the device is done, so that handles may be sent."""
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
        grids = [job.grid_thw for job in jobs]
        return self._deadlines.around(sum(grid.t * self._preparation.flop(grid.h * grid.w) for grid in grids))

    def _encode(self, jobs: Sequence[EncodeJob]) -> None:
        alike: dict[tuple[int, int], list[EncodeJob]] = defaultdict(list)
        for job in jobs:
            alike[job.grid_thw.h, job.grid_thw.w].append(job)
        for group in alike.values():
            self._encode_alike(group)

    def _encode_alike(self, jobs: Sequence[EncodeJob]) -> None:
        """Encodes chunks whose frames have one size."""
        info, grid, output = self._preparation.info, jobs[0].grid_thw._replace(t=1), jobs[0].output
        num_frames = sum(job.grid_thw.t for job in jobs)
        shape = (num_frames, info.num_tokens(grid), info.embedding_width)
        # One job's output is one block of the pool: the engine writes straight into it.
        is_direct = len(jobs) == 1 and output.dtype == self._dtype and output.is_contiguous()
        out = output.view(shape) if is_direct else torch.empty(shape, dtype=self._dtype, device=self._device)
        tensors = self._preparation.batch(jobs, self._device).tensors
        for frames in _slices(num_frames, self._max_frames(grid.num_patches)):
            self._run(self._part(tensors, frames), grid.num_patches, out[frames])
        if not is_direct:
            parts = out.flatten(0, 1).split([len(job.output) for job in jobs])
            for job, part in zip(jobs, parts, strict=True):
                job.output.copy_(part)

    def _part(self, tensors: Mapping[str, Tensor], frames: slice) -> dict[str, Tensor]:
        """The inputs of some frames of a batch."""
        part: dict[str, Tensor] = {}
        for spec in self._preparation.specs:
            tensor = tensors[spec.name]
            part[spec.name] = tensor[frames] if spec.is_by_frame else tensor
        return part


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))
