"""The torch engine: pictures of any sizes packed in one forward, normalised and cut into patches on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.messages import GridTHW
from workers.nn.layers import rotary_tables
from workers.vit.blocks import BLOCK_FLOP, Blocks
from workers.vit.models.qwen2_vl import VisionEncoder, patchify, rotary_angles
from workers.vit.slices import SliceLimit


class EncodeJob(NamedTuple):
    """One chunk: where its pixels are and where its embeddings go."""

    pixels: Tensor  # [frames, height, width, 3] uint8
    grid_thw: GridTHW
    output: Tensor  # [num_tokens, hidden]


class TorchEngine:
    """`limit` says in how many turns a large picture is encoded: between them the device is free for others.

    `after_work` is called whenever some work is done: after each layer, and on a CPU, which may take minutes
    for one, within layers.
    """

    def __init__(
        self, info: VisionInfo, encoder: VisionEncoder, limit: SliceLimit | None = None,
        after_work: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.info, self.encoder, self._limit, self._after_work = info, encoder, limit, after_work

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. When it returns the device is done with them, so handles may be sent."""
        device = self.encoder.device
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        angles = torch.cat([rotary_angles(job.grid_thw, self.info) for job in jobs]).to(device)
        cos, sin = rotary_tables(angles, torch.float32)
        lengths = [job.grid_thw.h * job.grid_thw.w for job in jobs for _ in range(job.grid_thw.t)]
        embeddings = self.encoder(patches, cos, sin, lengths, self._pauses(len(patches)), self._blocks())
        merged = self.info.merge_size**2
        for job, part in zip(jobs, embeddings.split([job.grid_thw.num_patches // merged for job in jobs]), strict=True):
            job.output.copy_(part)
        self._wait()

    def _pauses(self, num_patches: int) -> Callable[[int], None] | None:
        """Waits for the device after every so many layers, where one turn would be too long."""
        num_turns = 1 if self._limit is None else self._limit.num_turns(num_patches)
        if num_turns == 1 and self._after_work is None:
            return None
        step = max(1, self.info.depth // num_turns)

        def after_layer(index: int) -> None:
            if num_turns > 1 and (index + 1) % step == 0:
                self._wait()
            if self._after_work is not None:
                self._after_work()

        return after_layer

    def _blocks(self) -> Blocks | None:
        if self._after_work is None or self.encoder.device.type != "cpu":
            return None
        return Blocks(BLOCK_FLOP * torch.get_num_threads(), self._after_work)

    def _wait(self) -> None:
        if self.encoder.device.type == "cuda":
            torch.cuda.current_stream(self.encoder.device).synchronize()
