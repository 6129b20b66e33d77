"""The kernels of quantised weights in the interpreter, against the same numbers in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.workers.nn.test_expert_kernels import choose, reference
from tests.workers.nn.test_grouped import GROUPS, random_weight
from workers.nn.expert_kernels import choose_experts, experts
from workers.nn.fused import Kernels
from workers.nn.grouped_kernels import FEW_ROWS, LEAST_SPLIT, grouped_linear, split_inputs
from workers.nn.kernels import add_rms_norm, silu_mul
from workers.nn.weight_tiles import inputs_of_part, operand_of, widened_part
from workers.nn.weights.experts import GroupedExperts
from workers.nn.weights.grouped import GroupedLinear, GroupedWeight, NumberKind, arrange
from workers.nn.weights.grouped_cuda import CudaProduct, make_cuda_product

pytestmark = pytest.mark.interpreter

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
KINDS = {
    "int4": (NumberKind.INT4, False),
    "int4, zeros": (NumberKind.INT4, True),
    "int8": (NumberKind.INT8, False),
    "int8, zeros": (NumberKind.INT8, True),
    "fp8": (NumberKind.FP8, False),
}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_numbers(kind: NumberKind, has_zeros: bool, shape: tuple[int, int], group: int) -> GroupedWeight:
    num_groups = -(-shape[1] // group)
    scales, zeros = torch.rand(shape[0], num_groups) * 0.01 + 0.01, None
    if kind is NumberKind.FP8:
        numbers = torch.randn(shape).to(torch.float8_e4m3fn)
    elif kind is NumberKind.INT8:
        numbers = torch.randint(-128, 128, shape, dtype=torch.int8)
        if has_zeros:
            zeros = torch.randint(-128, 128, scales.shape, dtype=torch.int8)
    else:
        numbers = torch.randint(0, 16, shape, dtype=torch.uint8)
        if has_zeros:
            zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8)
    return arrange(kind, numbers, scales, zeros, torch.arange(shape[1]) // group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "group", "dtype"),
    [
        (1, 200, 128, torch.float32),
        (2, 72, 32, torch.float32),
        (17, 136, 64, torch.float16),
        (33, 72, 32, torch.float16),
    ],
)
def test_products(num_rows: int, num_inputs: int, group: int, dtype: torch.dtype, kind: str) -> None:
    """Outputs that are no multiple of a tile, a last group that is shorter, a bias and a residual."""
    torch.manual_seed(num_rows)
    weight = random_numbers(*KINDS[kind], (67, num_inputs), group)
    shapes = (num_rows, num_inputs), (67,), (num_rows, 67)
    x, bias, residual = (torch.randn(shape).to(dtype) for shape in shapes)
    expected = x.double() @ weight.widened(slice(None), torch.float32).double().t() + bias + residual
    found = grouped_linear(x, weight, bias, residual)
    assert found.dtype == dtype
    assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("groups", ["96", "one", "shuffled", "shuffled, of several sizes"])
def test_inputs_in_another_order_or_padded(groups: str) -> None:
    weight, dense = random_weight(NumberKind.INT4, True, GROUPS[groups], 9)
    x = torch.randn(2, dense.shape[1])
    assert error(grouped_linear(x, weight), x.double() @ dense.double().t()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["int4, zeros", "fp8"])
def test_inputs_are_split_where_outputs_are_few(kind: str) -> None:
    num_inputs = 2 * LEAST_SPLIT + 40
    assert split_inputs(2, 1, num_inputs) < num_inputs
    assert split_inputs(2, 1000, num_inputs) >= num_inputs, "there are enough outputs"
    weight = random_numbers(*KINDS[kind], (30, num_inputs), 128)
    x, bias, residual = torch.randn(2, num_inputs).half(), torch.randn(30).half(), torch.randn(2, 30).half()
    dense = weight.widened(slice(None), torch.float32).double()
    expected = x.double() @ dense.t() + bias + residual
    assert error(grouped_linear(x, weight, bias, residual), expected) < TOLERANCE[torch.float16]


def test_many_rows() -> None:
    weight = random_numbers(NumberKind.INT4, True, (70, 130), 128)
    x = torch.randn(FEW_ROWS + 67, 130).half()
    expected = x.double() @ weight.widened(slice(None), torch.float32).double().t()
    assert error(grouped_linear(x, weight), expected) < TOLERANCE[torch.float16]
    assert grouped_linear(x[:0], weight).shape == (0, 70)


def test_every_number_of_8_bits_is_widened_exactly() -> None:
    """Each FP8 number that is finite, by a row of the unit matrix; the ones below the least normal too."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    numbers = numbers[numbers.float().isfinite()][:, None].expand(-1, 32).contiguous()
    weight = arrange(NumberKind.FP8, numbers, torch.ones(len(numbers), 1), None, torch.zeros(32).long())
    for dtype in (torch.float32, torch.float16):
        found = grouped_linear(torch.eye(32, dtype=dtype)[:1], weight)
        assert torch.equal(found[0].float(), numbers[:, 0].float())


@triton.jit
def widen_kernel(
    weight, zeros, out, stride,
    KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    columns, first = tl.arange(0, OUTPUTS), tl.program_id(0).to(tl.int64)
    for part in tl.static_range(2 if KIND == "int4" else 1):
        dims = inputs_of_part(0, part, INPUTS, KIND)
        wide = widened_part(
            weight, zeros, first, columns, columns < OUTPUTS, 0, part, INPUTS, stride, 1,
            INPUTS, KIND, HAS_ZEROS, INPUTS, out.dtype.element_ty,
        )  # fmt: skip
        tl.store(out + columns[None, :] * INPUTS + dims[:, None], wide)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_holds_what_is_widened(kind: str) -> None:
    """Exactly, numbers minus zeros. The interpreter has no products of bfloat16."""
    weight = random_numbers(*KINDS[kind], (64, 128), 128)
    if weight.kind is NumberKind.INT8 and weight.zeros is not None:
        weight.numbers[0, :2], weight.zeros[0] = torch.tensor([-128, 127], dtype=torch.int8), 127
    operand, out = operand_of(weight), torch.zeros(64, 128, dtype=torch.bfloat16)
    widen_kernel[(1,)](
        operand.numbers, operand.zeros, out, operand.stride, operand.kind, operand.has_zeros, 128, 64
    )
    expected = weight._replace(scales=torch.ones(64, 1)).widened(slice(None), torch.float32)
    assert torch.equal(out.float(), expected)


def test_a_layer_has_the_kernels_of_its_device() -> None:
    weight = random_numbers(NumberKind.FP8, False, (32, 128), 128)
    bias, x, residual = torch.randn(32), torch.randn(3, 128), torch.randn(3, 32)
    assert isinstance(make_cuda_product(weight), CudaProduct)
    ours, by_torch = GroupedLinear(weight, bias, make_cuda_product), GroupedLinear(weight, bias)
    assert error(ours(x), by_torch(x)) < TOLERANCE[torch.float32]
    assert error(ours.add_to(residual, x), by_torch.add_to(residual, x)) < TOLERANCE[torch.float32]


def make_experts(
    kind: str, count: int, hidden: int, size: int, groups: tuple[int, int]
) -> tuple[GroupedWeight, GroupedWeight, tuple[Tensor, Tensor]]:
    """gate_up, down, and the dense ones of both."""
    gate_up = random_numbers(*KINDS[kind], (count * 2 * size, hidden), groups[0])
    down = random_numbers(*KINDS[kind], (count * hidden, size), groups[1])
    wide = [weight.widened(slice(None), torch.float32) for weight in (gate_up, down)]
    return gate_up, down, (wide[0].view(count, 2 * size, hidden), wide[1].view(count, hidden, size))


KERNELS = Kernels(add_rms_norm, silu_mul, choose_experts, experts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen", "held", "groups", "dtype"),
    [
        (1, 6, 2, (0, 6), (64, 32), torch.float32),
        (3, 6, 2, (3, 6), (32, 128), torch.float16),
        (40, 3, 2, (1, 3), (64, 32), torch.float16),
    ],
    ids=["few", "another rank", "many"],
)
def test_experts(
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
    held: tuple[int, int],
    groups: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
) -> None:
    """Plans for few and many rows an expert, experts of other ranks, sizes that are no multiple of a tile."""
    torch.manual_seed(num_tokens)
    hidden, size = 72, 40
    gate_up, down, wide = make_experts(kind, held[1] - held[0], hidden, size, groups)
    x = torch.randn(num_tokens, hidden).to(dtype)
    chosen, shares = choose(num_tokens, num_experts, num_chosen), torch.rand(num_tokens, num_chosen).to(dtype)
    found = GroupedExperts(gate_up, down, held[0], KERNELS)(x, chosen, shares)
    assert found.dtype == dtype
    assert error(found, reference(x, *wide, chosen, shares, held[0])) < 2 * TOLERANCE[dtype]


def test_experts_whose_inputs_are_in_another_order() -> None:
    groups = (torch.arange(64) // 32)[torch.randperm(64)]
    scales, numbers = torch.rand(2 * 64, 2), torch.randint(0, 16, (2 * 64, 64), dtype=torch.uint8)
    gate_up = arrange(NumberKind.INT4, numbers, scales, None, groups)
    down = arrange(NumberKind.INT4, numbers[:, :32], scales[:, :1], None, torch.zeros(32).long())
    wide = (numbers.float() - 8) * scales[:, groups], (numbers[:, :32].float() - 8) * scales[:, :1]
    x, chosen, shares = torch.randn(3, 64), choose(3, 2, 1), torch.rand(3, 1)
    found = GroupedExperts(gate_up, down, 0, KERNELS)(x, chosen, shares)
    expected = reference(x, wide[0].view(2, 64, 64), wide[1].view(2, 64, 32), chosen, shares, 0)
    assert error(found, expected) < TOLERANCE[torch.float32]


def test_experts_of_other_sizes_are_refused() -> None:
    gate_up, down, _ = make_experts("int8", 2, 64, 32, (32, 32))
    with pytest.raises(ValueError, match="gate_up has 128 outputs and 64 inputs, down 64 and 32"):
        GroupedExperts(gate_up, down._replace(numbers=down.numbers[:64]), 0, KERNELS)
