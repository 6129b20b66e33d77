"""The kernels of experts, compiled: what the interpreter shows of their results, and that a graph can hold
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.llm.models.experts import choose_experts as choose_by_torch
from workers.nn.weights.dense import TorchLinear
from workers.nn.weights.experts import ListedExperts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
COUNT, HIDDEN, SIZE, NUM_CHOSEN = 32, 512, 192, 4


def make(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    shapes = (num_tokens, HIDDEN), (COUNT, 2 * SIZE, HIDDEN), (COUNT, HIDDEN, SIZE), (num_tokens, COUNT)
    x, gate_up, down, scores = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    return x, gate_up * HIDDEN**-0.5, down * SIZE**-0.5, scores


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 1500])
@pytest.mark.parametrize("first", [0, 16])
def test_experts(num_tokens: int, first: int, dtype: torch.dtype) -> None:
    from workers.nn.expert_kernels import choose_experts, experts

    x, gate_up, down, scores = make(num_tokens, dtype)
    gate_up, down = gate_up[first:].contiguous(), down[first:].contiguous()
    chosen, shares = choose_experts(scores, NUM_CHOSEN)
    _, of_torch = choose_by_torch(scores, NUM_CHOSEN)
    assert error(shares.sort().values, of_torch.sort().values) < TOLERANCE[dtype]
    wide = [(TorchLinear(a), TorchLinear(b)) for a, b in zip(gate_up.double(), down.double(), strict=True)]
    expected = ListedExperts(wide, first)(x.double(), chosen, shares.double())
    out = experts(x, gate_up, down, chosen, shares, first)
    assert error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(out, experts(x, gate_up, down, chosen, shares, first)), "to the bit, each time"


def test_a_graph_takes_other_choices_at_each_replay() -> None:
    from workers.nn.expert_kernels import choose_experts, experts

    x, gate_up, down, scores = make(8, torch.bfloat16)
    experts(x, gate_up, down, *choose_experts(scores, NUM_CHOSEN), 0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, gate_up, down, *choose_experts(scores, NUM_CHOSEN), 0)
    for _ in range(3):
        x.normal_()
        scores.normal_()
        graph.replay()
        assert torch.equal(out, experts(x, gate_up, down, *choose_experts(scores, NUM_CHOSEN), 0))
