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
    """Packed rows [num_rows, heads, head_dim]; `lengths` are the rows of each segment, in order.

    On a CPU neighbouring segments of one length are one call of torch.
    """

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype, device: torch.device, pace: Pace) -> None:
        self._longest, self._pace = max(lengths), pace
        self._runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
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
        num_rows = [count * length for count, length in self._runs]
        rows = zip(*(x.split(num_rows) for x in (q, k, v)), strict=True)
        parts = [self._attend_run(run, *part) for run, part in zip(self._runs, rows, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_run(self, run: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[num_rows, heads, head_dim] of so many segments of one length."""
        segments = (x.unflatten(0, run).transpose(1, 2) for x in (q, k, v))
        return self._pace.attend(*segments).transpose(1, 2).flatten(0, 1)


def attention(lengths: Sequence[int] | None, x: Tensor, pace: Pace) -> Attend:
    """For packed rows like x, whose segments have these lengths; without lengths for a batch."""
    if lengths is None:
        return attend_in_batch
    return SegmentAttention(lengths, x.dtype, x.device, pace)


def attend_in_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Frames of one size [frames, num_rows, heads, head_dim]: no mask is needed, and it exports."""
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return heads.transpose(1, 2)
