"""How the experts of a layer are computed, in any format: one after the other, or stacked by kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.layers import silu_mul
from workers.nn.loader import Checkpoint
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.grouped import GroupedLinear, GroupedWeight, stack
from workers.nn.weights.shard import ExpertsShard


class ListedExperts(Experts):
    """One expert after the other, in layers of any format. The host sees which are chosen.

    A step reads each chosen expert once, with the rows of all tokens that chose it: its weights bound a
    decode step.
    """

    def __init__(self, layers: Sequence[tuple[Linear, Linear]], first: int) -> None:
        """`layers`: (gate_up, down) of the experts `first`, `first` + 1, …"""
        self.layers, self._first = layers, first

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if len(x) == 1:
            for expert, share in zip(chosen[0].tolist(), shares[0].tolist(), strict=True):
                if (layers := self._find(expert)) is not None:
                    out.add_(_compute(layers, x), alpha=share)
            return out
        for expert, tokens, of_tokens in _by_expert(chosen, shares):
            if (layers := self._find(expert)) is not None:
                out.index_add_(0, tokens, _compute(layers, x[tokens]).mul_(of_tokens))
        return out

    def _find(self, expert: int) -> tuple[Linear, Linear] | None:
        """None for an expert of another rank."""
        place = expert - self._first
        return self.layers[place] if 0 <= place < len(self.layers) else None


def _compute(layers: tuple[Linear, Linear], x: Tensor) -> Tensor:
    gate_up, down = layers
    return down(silu_mul(gate_up(x)))


def _by_expert(chosen: Tensor, shares: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each chosen expert once, with the tokens [n] that chose it, and their shares [n, 1]."""
    experts, order = chosen.flatten().sort(stable=True)
    numbers, counts = (found.tolist() for found in torch.unique_consecutive(experts, return_counts=True))
    tokens, ordered = order // chosen.shape[1], shares.flatten()[order, None]
    yield from zip(numbers, tokens.split(counts), ordered.split(counts), strict=True)


def list_experts(format: Format, checkpoint: Checkpoint, module: str, shard: ExpertsShard) -> Experts:
    """Experts that a checkpoint has one by one, in the layers of any format."""
    layers = []
    for number in shard.held:
        names = [f"{module}.{number}.{name}_proj" for name in ("gate", "up", "down")]
        gate_up = format.column(checkpoint, names[:2], [shard.intermediate] * 2, None)
        layers.append((gate_up, format.row(checkpoint, names[2], shard.intermediate)))
    return ListedExperts(layers, shard.held.start)


class StackedExperts(Experts):
    """All experts in one tensor each for the first and the second projections, which kernels pick from: the
    host does not see which are chosen, so a CUDA graph can capture it."""

    def __init__(self, gate_up: Tensor, down: Tensor, first: int, kernels: Kernels) -> None:
        """Of the experts `first`, `first` + 1, …: gate_up [num_held, 2 · intermediate, hidden], down
        [num_held, hidden, intermediate]."""
        self._gate_up, self._down, self._first, self._compute = gate_up, down, first, kernels.experts

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        return self._compute(x, self._gate_up, self._down, chosen, shares, self._first)


class GroupedExperts(Experts):
    """As `StackedExperts`, of weights of the one layout of quantised checkpoints: the same kernels widen
    them."""

    def __init__(
        self,
        gate_up: GroupedWeight,
        down: GroupedWeight,
        first: int,
        kernels: Kernels,
    ) -> None:
        """Of the experts `first`, `first` + 1, … the outputs one expert after the other (`grouped.stack`):
        gate_up [num_held · 2 · intermediate, hidden], in each expert gate first; down [num_held · hidden,
        intermediate]. On the device that computes.

        Raises ValueError for outputs that are no whole number of experts.
        """
        hidden, size = gate_up.in_features, down.in_features
        if gate_up.out_features * hidden != 2 * size * down.out_features or down.out_features % hidden:
            raise ValueError(
                f"gate_up has {gate_up.out_features} outputs and {hidden} inputs, down {down.out_features} "
                f"and {size}: these are not the same whole number of experts"
            )
        self._gate_up, self._down, self._first, self._compute = gate_up, down, first, kernels.experts

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        return self._compute(x, self._gate_up, self._down, chosen, shares, self._first)


def put_together(layers: Sequence[tuple[Linear, Linear]], first: int, kernels: Kernels | None) -> Experts:
    """Quantised experts, (gate_up, down) each: by kernels where there are any and all layouts are alike."""
    if kernels is not None:
        gate_up, down = (_stacked(side) for side in zip(*layers, strict=True))
        if gate_up is not None and down is not None:
            return GroupedExperts(gate_up, down, first, kernels)
    return ListedExperts(layers, first)


def _stacked(layers: Sequence[Linear]) -> GroupedWeight | None:
    weights = [layer.weight for layer in layers if isinstance(layer, GroupedLinear)]
    return stack(weights) if len(weights) == len(layers) else None
