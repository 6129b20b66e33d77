"""The kernels of quantised weights, compiled: what the interpreter shows of their results, and products of
bfloat16, which it does not have; and that a graph can hold them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.gpu_grouped import random_weight
from workers.llm.backends import choose_backend
from workers.nn.weights.dense import TorchLinear
from workers.nn.weights.experts import GroupedExperts, ListedExperts
from workers.nn.weights.grouped import GroupedLinear, GroupedWeight, NumberKind
from workers.nn.weights.scaled import has_scaled_product, make_scaled_product

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CUDA = torch.device("cuda", 0)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def wide(weight: GroupedWeight) -> Tensor:
    return weight.widened(slice(None), torch.float32).double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 17, 33, 64, 65, 300])
@pytest.mark.parametrize("kind", NumberKind)
def test_products(kind: NumberKind, num_rows: int, dtype: torch.dtype) -> None:
    """Inputs that are split for few rows; where FP8 has many, in bfloat16, activations may be in FP8 too."""
    from workers.nn.grouped_kernels import FEW_ROWS

    torch.manual_seed(num_rows)
    weight = random_weight(kind, 1008, 1024, CUDA)
    x, bias, residual = (
        torch.randn(shape, device=CUDA).to(dtype) for shape in ((num_rows, 1024), (1008,), (num_rows, 1008))
    )
    is_rounded = kind is NumberKind.FP8 and dtype == torch.bfloat16 and num_rows > FEW_ROWS
    tolerance = 0.05 if is_rounded else TOLERANCE[dtype]
    linear, expected = GroupedLinear(weight, bias), x.double() @ wide(weight).t() + bias
    assert error(linear(x), expected) < tolerance
    assert error(linear.add_to(residual, x), expected + residual) < tolerance
    assert torch.equal(linear(x), linear(x)), "to the bit, each time"


@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("kind", NumberKind)
def test_groups_of_other_sizes(kind: NumberKind, group: int) -> None:
    weight = random_weight(kind, 200, 1024, CUDA)
    scales = torch.rand(200, 1024 // group, device=CUDA)
    zeros = None if weight.zeros is None else torch.randint_like(scales, 16).to(torch.uint8)
    weight = weight._replace(scales=scales, zeros=zeros, group_size=group)
    x = torch.randn(5, 1024, device=CUDA).bfloat16()
    assert error(GroupedLinear(weight)(x), x.double() @ wide(weight).t()) < TOLERANCE[torch.bfloat16]


def test_fp8_in_blocks_of_many_rows() -> None:
    """By torch's scaled product, where the device has one: cuBLASLt's is for Hopper."""
    if not has_scaled_product(CUDA):
        pytest.skip("this device has no scaled product of blocks")
    weight = random_weight(NumberKind.FP8, 1024, 1024, CUDA)
    product = make_scaled_product(weight)
    assert product is not None
    x = torch.randn(333, 1024, device=CUDA).bfloat16()
    assert error(product(x, None, None), x.double() @ wide(weight).t()) < 0.05


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 600])
@pytest.mark.parametrize("kind", NumberKind)
def test_experts(kind: NumberKind, num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    count, first, hidden, size = 8, 4, 512, 128
    gate_up = random_weight(kind, count * 2 * size, hidden, CUDA)
    down = random_weight(kind, count * hidden, size, CUDA)
    kernels = choose_backend("triton", CUDA).kernels
    assert kernels is not None
    x = torch.randn(num_tokens, hidden, device=CUDA).to(dtype)
    chosen = torch.rand(num_tokens, 16, device=CUDA).topk(4).indices
    shares = torch.rand(num_tokens, 4, device=CUDA).to(dtype)
    pairs = zip(wide(gate_up).view(count, -1, hidden), wide(down).view(count, hidden, size), strict=True)
    exact = ListedExperts([(TorchLinear(a), TorchLinear(b)) for a, b in pairs], first)
    experts = GroupedExperts(gate_up, down, first, kernels)
    found = experts(x, chosen, shares)
    assert error(found, exact(x.double(), chosen, shares.double())) < TOLERANCE[dtype]
    assert torch.equal(found, experts(x, chosen, shares)), "to the bit, each time"


def test_a_graph_takes_other_rows_at_each_replay() -> None:
    linear = GroupedLinear(random_weight(NumberKind.INT4, 256, 1024, CUDA))
    x = torch.randn(8, 1024, device=CUDA).bfloat16()
    linear(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, linear(x))
