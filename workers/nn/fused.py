"""Fused operators of a decoder, where there are kernels for them (`workers/nn/kernels.py`).

That file needs Triton; this one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from torch import Tensor

from workers.nn.delta.backends import BY_TORCH, DeltaBackend

if TYPE_CHECKING:  # formats know the kernels, and the kernels their layout
    from workers.nn.weights.grouped import GroupedWeight

StackedWeight: TypeAlias = "Tensor | GroupedWeight"


class Kernels(NamedTuple):
    # (x, delta, weight, eps): x += delta, then the norm of x.
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    # silu(gate) · up of [rows, 2 · size], gate first.
    silu_mul: Callable[[Tensor], Tensor]
    # (logits [num_tokens, num_experts], k): the k best experts of each token, int64, and their shares, which
    # add up to 1, in the type of the logits. Both [num_tokens, k].
    choose_experts: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    # (x, gate_up, down, chosen, shares, first): as `Experts`, with experts `first`, `first` + 1, … in the
    # stacked weights gate_up [num_held, 2 · intermediate, hidden] and down [num_held, hidden, intermediate]:
    # both dense, or both quantised, with the outputs of all experts one after the other.
    experts: Callable[[Tensor, StackedWeight, StackedWeight, Tensor, Tensor, int], Tensor]
    linear_attention: DeltaBackend = BY_TORCH


def linear_attention_of(kernels: Kernels | None) -> DeltaBackend:
    return BY_TORCH if kernels is None else kernels.linear_attention
