"""The part of `tools.gpu_check` about quantised weights: linear layers and experts, beside dense ones in
bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu_parts import Machine, Row, captured
from workers.llm.backends import choose_backend
from workers.nn.fused import Kernels
from workers.nn.weights.base import Activations, Experts
from workers.nn.weights.dense import TorchLinear
from workers.nn.weights.experts import GroupedExperts, ListedExperts, StackedExperts
from workers.nn.weights.grouped import CHUNK, GroupedLinear, GroupedWeight, NumberKind, choose_product

NUM_LAYERS = 2  # in turn, so that no cache holds what is read
MAX_ERROR = {False: 0.01, True: 0.05}  # of what is computed in bfloat16; where activations are in FP8 too
# The least speed of a step that reads weights, beside twice the bytes, or four times; and of a prompt.
FASTER = {NumberKind.INT4: 2.4, NumberKind.INT8: 1.5, NumberKind.FP8: 1.5}
OF_PROMPT = 0.5


class _Sizes(NamedTuple):
    num_inputs: int
    num_outputs: int
    rows: tuple[int, ...]
    num_experts: int
    intermediate: int
    num_chosen: int
    tokens: tuple[int, ...]


LARGE = _Sizes(3584, 37_888, (1, 32, 2048), 128, 768, 8, (1, 32))
SMALL = _Sizes(128, 48, (2, 70), 4, 128, 2, (2,))


def grouped(machine: Machine) -> Iterator[Row]:
    """Gate and up of the 7B, and experts of the 30B-A3B."""
    sizes = SMALL if machine.is_small else LARGE
    for kind in NumberKind:
        yield from _linear(machine, kind, sizes)
        yield from _experts(machine, kind, sizes)


def random_weight(kind: NumberKind, num_outputs: int, num_inputs: int, device: torch.device) -> GroupedWeight:
    """With groups of 128 inputs, of which there must be a multiple; of 4 bits with zeros."""
    scales = torch.rand(num_outputs, num_inputs // CHUNK, device=device) * 0.02 / num_inputs**0.5
    zeros = None
    if kind is NumberKind.FP8:
        numbers = torch.randn(num_outputs, num_inputs, device=device).to(torch.float8_e4m3fn)
    elif kind is NumberKind.INT8:
        numbers = torch.randint(-128, 128, (num_outputs, num_inputs), device=device, dtype=torch.int8)
    else:
        numbers = torch.randint(0, 256, (num_outputs, num_inputs // 2), device=device, dtype=torch.uint8)
        zeros = torch.randint(0, 16, scales.shape, device=device, dtype=torch.uint8)
    return GroupedWeight(kind, numbers, scales, zeros, CHUNK, num_inputs, num_inputs, None)


def _layer(weight: GroupedWeight) -> GroupedLinear:
    """On a CPU, where the parts are only tried, with exact activations: nothing here allows for others."""
    if weight.numbers.device.type == "cpu":
        return GroupedLinear(weight, choose=functools.partial(choose_product, activations=Activations.NONE))
    return GroupedLinear(weight)


def _linear(machine: Machine, kind: NumberKind, sizes: _Sizes) -> Iterator[Row]:
    weights = [
        random_weight(kind, sizes.num_outputs, sizes.num_inputs, machine.device) for _ in range(NUM_LAYERS)
    ]
    layers = [_layer(weight) for weight in weights]
    dense = [weight.widened(slice(None), torch.bfloat16) for weight in weights]
    for num_rows in sizes.rows:
        x = torch.randn(num_rows, sizes.num_inputs, device=machine.device).bfloat16()
        ours = _seconds(machine, [functools.partial(layer, x) for layer in layers])
        theirs = _seconds(machine, [functools.partial(F.linear, x, weight) for weight in dense])
        expected = x.float() @ weights[0].widened(slice(None), torch.float32).t()
        is_rounded = kind is NumberKind.FP8 and num_rows == max(sizes.rows)
        yield from _rows(
            f"{kind.value} linear, {num_rows} rows", ours, theirs, _error(layers[0](x), expected),
            FASTER[kind] if num_rows == min(sizes.rows) else OF_PROMPT, MAX_ERROR[is_rounded],
        )  # fmt: skip


def _experts(machine: Machine, kind: NumberKind, sizes: _Sizes) -> Iterator[Row]:
    count, hidden, size = (
        sizes.num_experts,
        sizes.num_inputs if machine.is_small else 2048,
        sizes.intermediate,
    )
    kernels = choose_backend("auto", machine.device).kernels
    pairs = [
        (
            random_weight(kind, count * 2 * size, hidden, machine.device),
            random_weight(kind, count * hidden, size, machine.device),
        )
        for _ in range(NUM_LAYERS)
    ]
    ours = [_quantized(gate_up, down, count, kernels) for gate_up, down in pairs]
    theirs = [_dense(gate_up, down, count, kernels, torch.bfloat16) for gate_up, down in pairs]
    exact = _dense(*pairs[0], count, None, torch.float32)
    for num_tokens in sizes.tokens:
        x = torch.randn(num_tokens, hidden, device=machine.device).bfloat16()
        chosen = torch.rand(num_tokens, count, device=machine.device).topk(sizes.num_chosen).indices
        shares = torch.full_like(chosen, 1, dtype=torch.bfloat16) / sizes.num_chosen
        found = ours[0](x, chosen, shares)
        ours_s, theirs_s = (
            _seconds(machine, [functools.partial(layer, x, chosen, shares) for layer in layers])
            for layers in (ours, theirs)
        )
        yield from _rows(
            f"{kind.value} experts, {num_tokens} tokens", ours_s, theirs_s,
            _error(found, exact(x.float(), chosen, shares.float())),
            FASTER[kind] if num_tokens == min(sizes.tokens) else OF_PROMPT, MAX_ERROR[False],
        )  # fmt: skip


def _quantized(gate_up: GroupedWeight, down: GroupedWeight, count: int, kernels: Kernels | None) -> Experts:
    if kernels is not None:
        return GroupedExperts(gate_up, down, 0, kernels)
    parts = zip(_split(gate_up, count), _split(down, count), strict=True)
    return ListedExperts([(_layer(first), _layer(second)) for first, second in parts], 0)


def _dense(
    gate_up: GroupedWeight, down: GroupedWeight, count: int, kernels: Kernels | None, dtype: torch.dtype
) -> Experts:
    """The same experts, widened."""
    wide = [weight.widened(slice(None), dtype).unflatten(0, (count, -1)) for weight in (gate_up, down)]
    if kernels is not None:
        return StackedExperts(wide[0], wide[1], 0, kernels)
    return ListedExperts([(TorchLinear(a), TorchLinear(b)) for a, b in zip(*wide, strict=True)], 0)


def _split(weight: GroupedWeight, count: int) -> Iterator[GroupedWeight]:
    for number in range(count):
        part = slice(number * weight.out_features // count, (number + 1) * weight.out_features // count)
        zeros = None if weight.zeros is None else weight.zeros[part]
        yield weight._replace(numbers=weight.numbers[part], scales=weight.scales[part], zeros=zeros)


def _seconds(machine: Machine, calls: list[Callable[[], Tensor]]) -> float:
    """Of one call: on a GPU in a graph of them all."""

    def run() -> None:
        for call in calls:
            call()

    return machine.seconds(captured(run) if machine.device.type == "cuda" else run) / len(calls)


def _rows(
    what: str, ours: float, dense: float, error: float, wanted: float, most_error: float
) -> Iterator[Row]:
    told = f"{ours * 1e6:.1f} µs, dense {dense * 1e6:.1f} µs"
    yield Row(what, told, dense / ours, wanted, "the dense product in bfloat16")
    yield Row(f"error of {what}", f"{error:.4f}", error, -most_error, "the same numbers in float32")


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
