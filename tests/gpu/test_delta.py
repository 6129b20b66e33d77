"""The kernels of layers with linear attention, compiled: the rule token by token, and a graph of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.nn.delta.token_by_token import (
    DeltaShape,
    copied,
    make_inputs,
    make_layer_states,
    plan_spans,
    token_by_token,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHAPES = [DeltaShape(4, 4, 128, 128), DeltaShape(2, 6, 128, 128), DeltaShape(2, 4, 16, 24)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", [[1, 1], [1, 65, 130], [300, 64, 1]])
def test_steps(counts: list[int], shape: DeltaShape, dtype: torch.dtype) -> None:
    from workers.nn.delta.triton import TritonDeltaNet

    net = shape.make_net(TritonDeltaNet, "cuda")
    rows = make_inputs(shape, sum(counts), dtype, device="cuda")
    found = make_layer_states(shape, 5, dtype, "cuda")
    expected, slots = copied(found), [3, 0, 4][: len(counts)]
    starts = [61, 64, 7][: len(counts)]
    out = net(*rows, found, plan_spans(torch.tensor(slots, device="cuda"), counts, starts, 3))
    first = 0
    for slot, count in zip(slots, counts, strict=True):
        part = slice(first, first + count)
        assert error(out[part], token_by_token(net, rows.at(part), expected, slot)) < TOLERANCE[dtype]
        first += count
    assert error(found.memory, expected.memory) < TOLERANCE[dtype]
    assert torch.equal(found.inputs, expected.inputs)


def test_a_graph_takes_other_slots_at_each_replay() -> None:
    from workers.nn.delta.triton import TritonDeltaNet

    shape = SHAPES[0]
    net, rows = shape.make_net(TritonDeltaNet, "cuda"), make_inputs(shape, 3, torch.bfloat16, device="cuda")
    states, slots = (
        make_layer_states(shape, 5, torch.bfloat16, "cuda"),
        torch.tensor([0, 1, 4], device="cuda"),
    )
    net(*rows, states, plan_spans(slots, None, None, 3))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = net(*rows, states, plan_spans(slots, None, None, 3))
    for chosen in ([0, 1, 4], [3, 2, 4], [1, 3, 0]):
        slots.copy_(torch.tensor(chosen))
        expected = copied(states)
        graph.replay()
        assert torch.equal(out, net(*rows, expected, plan_spans(slots, None, None, 3)))
        assert torch.equal(states.memory, expected.memory)
        assert torch.equal(states.inputs, expected.inputs)
