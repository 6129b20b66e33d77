"""Puts the embeddings of pictures and videos where a step reads them, whatever their width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pipeline.wire.handles import TensorHandle
from pipeline.wire.steps import EmbeddingSlice
from workers.llm.models.base import Features
from workers.nn.loader import to_device

# (out, embeddings, start): fills `out` with consecutive rows of the embeddings, from row `start` on.
Gather = Callable[[Tensor, TensorHandle, int], None]


class PlacedSlice(NamedTuple):
    first: int  # index in the step of the token that takes the slice's first row
    part: EmbeddingSlice


def place_embeddings(
    x: Tensor,
    slices: Sequence[PlacedSlice],
    gather: Gather,
    num_features: int,
) -> Features | None:
    """Overwrites rows of x [num_tokens, hidden] with embeddings, and returns the further features they carry.

    A row of embeddings has (1 + num_features) · hidden numbers. Raises StaleHandleError when embeddings are
    no longer there.
    """
    if not num_features:
        for first, part in slices:
            gather(x[first : first + part.length], part.embeddings, part.start)
        return None
    if not slices:
        return None
    hidden = x.shape[1]
    wide = x.new_empty(sum(part.length for _, part in slices), (1 + num_features) * hidden)
    start = 0
    for _, part in slices:
        gather(wide[start : start + part.length], part.embeddings, part.start)
        start += part.length
    tokens = np.concatenate([np.arange(first, first + part.length) for first, part in slices])
    rows = to_device(tokens, x.device)
    x[rows] = wide[:, :hidden]
    return Features(rows, wide[:, hidden:].unflatten(1, (num_features, hidden)))
