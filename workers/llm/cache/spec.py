"""The cache entries of a decoder's layers: the decoder declares them, `plan.py` sizes them, the runner
allocates them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from workers.llm.cache.kv_formats import SCALE_BYTES, KvFormat


class Paged(NamedTuple):
    """Keys and values of each token, in blocks of the KV cache: they grow with the sequence."""

    num_kv_heads: int  # of one rank
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype, kv_format: KvFormat | None = None) -> int:
        """In a model of this type; with a format its numbers, and their scales."""
        head = self.head_dim * dtype.itemsize if kv_format is None else self.head_dim + SCALE_BYTES
        return 2 * self.num_kv_heads * head


class State(NamedTuple):
    """A tensor of constant size for each sequence, zero at its start."""

    shape: tuple[int, ...]  # of one sequence, on one rank
    dtype: torch.dtype | None  # None: the model's

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of one sequence, in a model of this type."""
        return math.prod(self.shape) * (self.dtype or dtype).itemsize


# In the order of the layers; a layer with two states has two entries. Paged entries and states are numbered
# separately, both from 0.
CacheSpec = Sequence[Paged | State]


def paged_of(spec: CacheSpec) -> list[Paged]:
    return [entry for entry in spec if isinstance(entry, Paged)]


def token_bytes(spec: CacheSpec, dtype: torch.dtype, kv_format: KvFormat | None) -> int:
    """Of the keys and values of one token, in all layers."""
    return sum(paged.bytes_per_token(dtype, kv_format) for paged in paged_of(spec))


def state_bytes(spec: CacheSpec, dtype: torch.dtype) -> int:
    """Of all states of one sequence."""
    return sum(state.nbytes(dtype) for state in states_of(spec))


def states_of(spec: CacheSpec) -> list[State]:
    return [entry for entry in spec if isinstance(entry, State)]
