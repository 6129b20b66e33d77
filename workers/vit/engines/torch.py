"""The torch engine: pictures of any sizes packed in one forward, normalised and cut into patches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.messages import GridTHW
from workers.nn.layers import rotary_tables
from workers.vit.models.qwen2_vl import VisionEncoder, patchify, rotary_angles


class EncodeJob(NamedTuple):
    """One chunk: where its pixels are and where its embeddings go."""

    pixels: Tensor  # [frames, height, width, 3] uint8
    grid_thw: GridTHW
    output: Tensor  # [num_tokens, hidden]


class TorchEngine:
    def __init__(self, info: VisionInfo, encoder: VisionEncoder) -> None:
        self.info, self.encoder = info, encoder

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fills every job's output. When it returns the device is done with them, so handles may be sent."""
        device = self.encoder.device
        patches = torch.cat([patchify(job.pixels.to(device), self.info) for job in jobs])
        angles = torch.cat([rotary_angles(job.grid_thw, self.info) for job in jobs]).to(device)
        cos, sin = rotary_tables(angles, torch.float32)
        lengths = [job.grid_thw.h * job.grid_thw.w for job in jobs for _ in range(job.grid_thw.t)]
        embeddings = self.encoder(patches, cos, sin, lengths)
        merged = self.info.merge_size**2
        for job, part in zip(jobs, embeddings.split([job.grid_thw.num_patches // merged for job in jobs]), strict=True):
            job.output.copy_(part)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
