"""Attention within segments of packed rows: the frames of pictures and videos, or windows in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.vit.pace import Pace

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v […, num_rows, heads, head_dim] → the same shape


class SegmentAttention:
    """Packed rows [num_rows, heads, head_dim]; `lengths` are the rows of each segment, in order."""

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype, device: torch.device, pace: Pace) -> None:
        self._lengths, self._longest, self._pace = list(lengths), max(lengths), pace
        self._ends: Tensor | None = None
        if device.type == "cuda" and dtype != torch.float32:  # no kernel takes float32
            ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            self._ends = ends.to(device, non_blocking=True)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._ends is not None:
            from torch.nn.attention.varlen import varlen_attn

            ends, longest = self._ends, self._longest
            out = varlen_attn(q, k, v.contiguous(), ends, ends, longest, longest)
            return out  # type: ignore[return-value]
        segments = zip(*(x.transpose(0, 1).split(self._lengths, dim=1) for x in (q, k, v)), strict=True)
        parts = [self._pace.attend(q, k, v) for q, k, v in segments]
        return torch.cat(parts, dim=1).transpose(0, 1)


def attend_in_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Frames of one size [frames, num_rows, heads, head_dim]: no mask is needed, and it exports."""
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return heads.transpose(1, 2)
