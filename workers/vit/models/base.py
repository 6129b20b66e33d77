"""The contract of a vision tower.

A tower has two parts. Its `Preparation` turns chunks into named tensors and knows all that depends on their
grids; it needs no weights. Its `Encoder` computes embeddings from these tensors. Engines call the two and
know no family: an ONNX file has the inputs that the preparation names, and the engine that runs the file
prepares them without an encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.wire.messages import GridTHW
from workers.nn.weights.weights import Weights
from workers.vit.pace import UNPACED, Pace


class EncodeJob(NamedTuple):
    """One chunk: where its pixels are and where its embeddings go."""

    pixels: Tensor  # [frames, height, width, 3] uint8
    grid_thw: GridTHW
    output: Tensor  # [num_tokens, width]


class Axis(NamedTuple):
    """An axis of an input whose size differs from run to run."""

    name: str
    most: int
    multiple: int = 1  # sizes are whole multiples of this


FRAMES = Axis("frames", 1 << 16)  # of a batch: temporal patches


class InputSpec(NamedTuple):
    """A tensor that a forward takes, as an ONNX file declares it."""

    name: str
    dtype: torch.dtype
    axes: tuple[Axis | int, ...]

    @property
    def is_by_frame(self) -> bool:
        """Each frame has a part of its own; others are the same for all frames of a batch."""
        return self.axes[0] == FRAMES

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis.name] if isinstance(axis, Axis) else axis for axis in self.axes)


class Inputs(NamedTuple):
    """What a forward takes.

    Packed inputs have all patches side by side, and `lengths` says where frames (and what else patches attend
    within) end. A batch has the axis of frames, and no lengths: its frames are of one size.
    """

    tensors: Mapping[str, Tensor]
    lengths: Mapping[str, Sequence[int]]


class Preparation(ABC):
    """Everything that depends on grids, without weights."""

    def __init__(self, info: VisionInfo) -> None:
        self.info = info

    @property
    @abstractmethod
    def specs(self) -> tuple[InputSpec, ...]:
        """The tensors of a batch, in the order in which an ONNX file declares them."""

    @abstractmethod
    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        """Of chunks of any sizes."""

    @abstractmethod
    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        """Of chunks whose frames have one size: tensors as `specs` says, contiguous."""

    def sizes(self, num_frames: int, num_patches: int) -> dict[str, int]:
        """How large the axes of a batch are, by name. A tower with more axes adds its own."""
        return {FRAMES.name: num_frames, "patches": num_patches}

    def flop(self, num_patches: int) -> float:
        """Floating point operations of a forward of one frame, about."""
        info = self.info
        linear = 4.0 * info.embed_dim * (2 * info.embed_dim + info.intermediate_size)
        attention = 4.0 * num_patches * info.embed_dim
        return info.depth * num_patches * (linear + attention)


class Encoder(ABC):
    """A tower with its weights."""

    preparation: Preparation
    dtype: torch.dtype
    device: torch.device

    def prepare(self, jobs: Sequence[EncodeJob]) -> Inputs:
        return self.preparation.packed(jobs, self.device)

    @abstractmethod
    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> Tensor:
        """Embeddings [num_tokens, width] of packed inputs, [frames, num_tokens, width] of a batch.

        Tells `pace` of its layers and lets it cut packed work, so that a picture of any size can be paused.
        """


class Tower(NamedTuple):
    """What a tower's module names in `TOWER`; a family names the module."""

    preparation: Callable[[VisionInfo], Preparation]
    encoder: Callable[[VisionInfo, Weights], Encoder]
    prefix: str  # of its tensors' names in a checkpoint
