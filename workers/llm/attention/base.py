"""The contract of an attention backend: attention over a paged KV cache, for a flat batch of sequences.

    step = backend.plan(spans)                             once per step, shared by all layers
    rotary = step.rotary(angles, dtype)                    once per step
    step.write(layer, qkv, rotary)                         once per layer
    attended = step.attend(layer, qkv)                     once per layer

A backend does not own the cache and knows no model; layers may differ in their numbers of heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.llm.cache.paged_tensors import PagedTensors

# Cosines and sines of a step, in the backend's own form.
Rotary = tuple[Tensor, Tensor]


class SequencePart(NamedTuple):
    """One sequence's part of a step: `num_tokens` new tokens behind `num_computed` cached ones."""

    num_tokens: int
    num_computed: int
    block_table: Sequence[int] | npt.NDArray[np.int32]

    @property
    def length(self) -> int:
        return self.num_computed + self.num_tokens


class HeadNorm(NamedTuple):
    """Root-mean-square norms over each query head and each key head, before the rotation. The weights are of
    the activations' type, or in float32 where their rounding would count."""

    query: Tensor  # [head_dim], the norm's weight
    key: Tensor  # [head_dim]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """A layer with a paged cache, as one rank holds it."""

    index: int  # among the layers with a paged cache
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: Tensor | None = None  # [(heads + 2 · kv_heads) · head_dim]; None if the projection adds it
    norm: HeadNorm | None = None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Views: queries, and keys before values.

        [num_tokens, heads, head_dim] and [num_tokens, 2 · kv_heads, head_dim].
        """
        return qkv[:, : self.num_heads], qkv[:, self.num_heads :]


class AttentionStep(ABC):
    """The plan of one step, and its attention.

    `qkv` is [num_tokens, heads + 2 · kv_heads, head_dim].
    """

    @abstractmethod
    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Rotary:
        """For `write`, of angles [num_tokens, n] float32; the activations are of type `dtype`.

        n is head_dim / 2, or less: then only the first 2 n numbers of each head are turned.
        """

    @abstractmethod
    def write(self, layer: AttentionLayer, qkv: Tensor, rotary: Rotary) -> None:
        """Adds the layer's bias, norms and rotates queries and keys, and writes keys and values to the cache.

        Afterwards `qkv` is the input of `attend` of the same backend.
        """

    @abstractmethod
    def attend(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        """[num_tokens, heads, head_dim], after `write` with this `qkv`."""


class AttentionBackend(ABC):
    """`cache` has a tensor for each paged layer."""

    def __init__(self, cache: PagedTensors) -> None:
        self.cache = cache

    @abstractmethod
    def plan(self, spans: Sequence[SequencePart]) -> AttentionStep:
        """A step of these sequences; those with one new token come first."""

    @abstractmethod
    def plan_decode(self, new_slots: Tensor, tables: Tensor, lengths: Tensor, longest: int) -> AttentionStep:
        """A step of sequences with one new token each, from tensors on the device.

        A CUDA graph replays the step with other values in these tensors. All are int32: new_slots [n], for
        the new keys and values; tables [n, max_blocks]; lengths [n], with the new token. No context is longer
        than `longest`.
        """

    @abstractmethod
    def warm_up(self, layers: Sequence[AttentionLayer]) -> None:
        """Compiles the kernels for steps of these layers. Writes only to the spare block of the cache."""
