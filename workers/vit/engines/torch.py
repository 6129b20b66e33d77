"""The torch engine: one forward over packed pictures of any sizes; patches are made on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from workers.nn.weights.adapters import AdapterSet
from workers.vit.blocks import BLOCK_FLOP, Blocks, Hurry
from workers.vit.models.base import EncodeJob, Encoder
from workers.vit.pace import UNPACED, Pace
from workers.vit.slices import SliceLimit


class TorchEngine:
    """`limit` gives the number of parts in which a large picture is encoded; between two parts the device is
    free for other processes.

    `after_work` is called after each layer, and on a CPU, which may take minutes for one, within layers: the
    more often while `is_hurried`.
    """

    def __init__(
        self, encoder: Encoder, limit: SliceLimit | None = None,
        after_work: Callable[[], object] | None = None, is_hurried: Callable[[], bool] = lambda: False,
        adapters: AdapterSet | None = None,
    ) -> None:  # fmt: skip
        self.encoder, self._limit, self._after_work = encoder, limit, after_work
        self._hurry, self._adapters = Hurry(is_hurried), adapters

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. On return the device is done, so that handles may be sent.

        One forward for all jobs with the same adapter: windows and merged patches put rows into other orders
        and numbers from layer to layer.
        """
        for number, alike in itertools.groupby(sorted(jobs, key=_adapter_of), _adapter_of):
            with nullcontext() if self._adapters is None else self._adapters.of_all(number):
                self._encode(list(alike))
        self._wait()

    def _encode(self, jobs: Sequence[EncodeJob]) -> None:
        num_patches = sum(job.grid_thw.num_patches for job in jobs)
        inputs = self.encoder.prepare(jobs)
        if self._after_work is not None:
            self._after_work()
        embeddings = self.encoder.forward(inputs, self._pace(num_patches))
        for job, part in zip(jobs, embeddings.split([len(job.output) for job in jobs]), strict=True):
            job.output.copy_(part)

    def _pace(self, num_patches: int) -> Pace:
        """Waits for the device after every part of a forward that is longer than a slice."""
        num_turns = 1 if self._limit is None else self._limit.num_turns(num_patches)
        if num_turns == 1 and self._after_work is None:
            return UNPACED
        step = max(1, self.encoder.preparation.info.depth // num_turns)
        num_layers = 0

        def after_layer() -> None:
            nonlocal num_layers
            num_layers += 1
            if num_turns > 1 and num_layers % step == 0:
                self._wait()
            if self._after_work is not None:
                self._after_work()

        return Pace(after_layer, self._blocks())

    def _blocks(self) -> Blocks | None:
        if self._after_work is None or self.encoder.device.type != "cpu":
            return None
        return Blocks(BLOCK_FLOP * torch.get_num_threads(), self._after_work, self._hurry)

    def _wait(self) -> None:
        if self.encoder.device.type == "cuda":
            torch.cuda.current_stream(self.encoder.device).synchronize()


def _adapter_of(job: EncodeJob) -> int:
    return job.adapter
