"""The contract of a vision tower.

A tower has two parts. Its `Preparation` turns chunks into named tensors, which is all that depends on their
grids; it needs no weights. Its `Encoder` computes embeddings from these tensors. Engines know no family. An
ONNX file has the inputs that the preparation names, so that its engine needs no encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.wire.base import GridTHW
from workers.nn.weights.adapters import NO_ADAPTER
from workers.nn.weights.weights import Weights
from workers.vit.pace import UNPACED, Pace


class EncodeJob(NamedTuple):
    """The pixels of one chunk, and the tensor for its embeddings."""

    pixels: Tensor  # [frames, height, width, 3] uint8
    grid_thw: GridTHW
    output: Tensor  # [num_tokens, width]
    adapter: int = NO_ADAPTER  # by number


class Axis(NamedTuple):
    """A dynamic axis of an input."""

    name: str
    most: int
    multiple: int = 1  # sizes are whole multiples of this


FRAMES = Axis("frames", 1 << 16)  # of a batch: temporal patches
PATCHES = "patches"  # the name of the axis of a frame's patches


class Range(NamedTuple):
    """The sizes of an axis for which an engine is built."""

    least: int
    usual: int
    most: int


class InputSpec(NamedTuple):
    """An input of a forward, as an ONNX file declares it."""

    name: str
    dtype: torch.dtype
    axes: tuple[Axis | int, ...]

    @property
    def is_by_frame(self) -> bool:
        """Whether each frame has a part of its own; other inputs are shared by all frames of a batch."""
        return self.axes[0] == FRAMES

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis.name] if isinstance(axis, Axis) else axis for axis in self.axes)


class Inputs(NamedTuple):
    """The inputs of a forward.

    Packed inputs have all patches in one axis, and `lengths` are the rows of each attention segment (a frame,
    or a window in it). A batch has an axis of frames, which have one size, and no lengths.
    """

    tensors: Mapping[str, Tensor]
    lengths: Mapping[str, Sequence[int]]


class Preparation(ABC):
    """The part of a tower that depends on grids and needs no weights."""

    def __init__(self, info: VisionInfo) -> None:
        self.info = info

    @property
    @abstractmethod
    def specs(self) -> tuple[InputSpec, ...]:
        """The tensors of a batch, in the order in which an ONNX file declares them."""

    @abstractmethod
    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        """Packed inputs of chunks of any sizes."""

    @abstractmethod
    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        """Inputs of chunks whose frames have one size: contiguous tensors as in `specs`."""

    @property
    def sample_grid(self) -> GridTHW:
        """Frames with which a forward is traced: no axis may have the size 0 or 1, a constant for tracing."""
        merge = self.info.merge_size
        return GridTHW(2, merge, 3 * merge)

    def sizes(self, frames: Range, patches: Range) -> dict[str, Range]:
        """The sizes of a batch's axes, by name, for these numbers of frames, and of patches in each. A tower
        with more axes adds its own."""
        return {FRAMES.name: frames, PATCHES: patches}

    def flop(self, num_patches: int) -> float:
        """The approximate floating point operations of a forward of one frame."""
        return self.info.depth * self.layer_flop(num_patches, num_patches)

    def layer_flop(self, num_patches: int, num_attended: int, mlp_matrices: int = 2) -> float:
        """Of one layer with so many matrices in its MLP, where a patch attends to so many."""
        info = self.info
        linear = 2.0 * info.embed_dim * (4 * info.embed_dim + mlp_matrices * info.intermediate_size)
        attention = 4.0 * num_attended * info.embed_dim
        return num_patches * (linear + attention)


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

        Calls `pace` after each layer, and computes packed rows through it, so that a large picture can pause.
        """


class Tower(NamedTuple):
    """A tower's module has one as `TOWER`; a family names the module."""

    preparation: Callable[[VisionInfo], Preparation]
    encoder: Callable[[VisionInfo, Weights], Encoder]
    prefix: str  # of its tensors' names in a checkpoint
