"""The contract of an attention backend: attention over a paged KV cache, for sequences side by side.

    step = backend.plan(spans)                             what all layers of a step need to know, once a step
    rotary = step.rotary(angles, dtype)                    once a step
    step.write(layer, qkv, rotary)                         once a layer
    attended = step.attend(layer, qkv)                     once a layer

A backend does not own the cache, knows no model, and computes each layer with the heads that the layer has.
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

# Cosines and sines of a step, in the form that the backend which made them reads.
Rotary = tuple[Tensor, Tensor]


class Span(NamedTuple):
    """One sequence's part of a step: `num_tokens` new tokens behind `num_computed` cached ones."""

    num_tokens: int
    num_computed: int
    block_table: Sequence[int] | npt.NDArray[np.int32]

    @property
    def length(self) -> int:
        return self.num_computed + self.num_tokens


class HeadNorm(NamedTuple):
    """Root-mean-square norms over each query head and each key head, before they are turned."""

    query: Tensor  # [head_dim], what a query head is multiplied by
    key: Tensor  # [head_dim]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """A layer with a paged cache, as one rank holds it."""

    index: int  # among the layers with a paged cache
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: Tensor | None = None  # [(heads + 2 · kv_heads) · head_dim], where the projection has not added it
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
    """The attention of one step, whose plan it holds.

    `qkv` is [num_tokens, heads + 2 · kv_heads, head_dim].
    """

    @abstractmethod
    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Rotary:
        """For `write`, of angles [num_tokens, head_dim / 2] float32; the activations are of type `dtype`."""

    @abstractmethod
    def write(self, layer: AttentionLayer, qkv: Tensor, rotary: Rotary) -> None:
        """Adds the layer's bias, norms and turns queries and keys, and caches keys and values.

        Afterwards `qkv` is what `attend` of the same backend takes: its queries are ready.
        """

    @abstractmethod
    def attend(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        """[num_tokens, heads, head_dim], once `write` has seen this `qkv`."""


class AttentionBackend(ABC):
    """`cache` has a tensor for each layer that is ever written to or attended by."""

    def __init__(self, cache: PagedTensors) -> None:
        self.cache = cache

    @abstractmethod
    def plan(self, spans: Sequence[Span]) -> AttentionStep:
        """A step of these sequences, side by side, those with one new token in front."""

    @abstractmethod
    def plan_decode(self, new_slots: Tensor, tables: Tensor, lengths: Tensor, longest: int) -> AttentionStep:
        """A step of sequences with one new token each, from tensors on the device.

        The tensors may change behind the plan's back where a CUDA graph holds the step. new_slots [n]:
        where the new keys and values go; tables [n, most blocks]; lengths [n], the new token included. All
        are int32. `longest`: no context is longer.
        """

    @abstractmethod
    def warm_up(self, layers: Sequence[AttentionLayer]) -> None:
        """Compiles what steps of these layers will ask for. Writes to the spare block of the cache only."""
