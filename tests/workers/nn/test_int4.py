"""Weights of 4 bits: how near they are, and their products by each kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.nn.test_quantized_panels import KERNELS
from workers.nn.native.int4 import GROUP, dequantized, pack_int4, pack_with_torch, quantize_int4
from workers.nn.native.quantized_panels import quantized_kernels

SHAPES = [(64, 64), (100, 60), (7, 2), (513, 1031), (1024, 768)]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_weights_are_near(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    found = dequantized(weight)
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    assert error(found, weight) < 0.09


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_of_one_sign(sign: int) -> None:
    torch.manual_seed(0)
    weight = sign * (3 + torch.rand(64, 256))
    assert error(dequantized(weight), weight) < 0.025


def test_zeros_pay_where_one_side_is_wider() -> None:
    torch.manual_seed(0)
    weight = torch.rand(64, 256) - 0.2
    assert error(dequantized(weight), weight) < 0.05, "with steps from -0.8 to 0.8 it were 0.07"


def test_numbers_are_within_their_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * torch.logspace(-6, 3, 64)[:, None]
    weight[:, 0] = 1e4  # an outlier, beside which its row's other groups are small
    weight[0] = 0
    weight[1] = 5
    quantized = quantize_int4(weight)
    for numbers, least, most in (
        (quantized.q, 0, 15),
        (quantized.zeros, 0, 15),
        (quantized.sizes, 1, 16),
        (quantized.whole(), -128, 127),
    ):
        assert torch.equal(numbers, numbers.round())
        assert least <= float(numbers.min()) <= float(numbers.max()) <= most
    assert quantized.q.shape == (64, 256 // GROUP, GROUP)
    found = dequantized(weight)
    assert not found[0].any()
    torch.testing.assert_close(found[1], weight[1], rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 6, 7, 16, 17, 33, 100])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_int4(shape: tuple[int, int], kernel: str, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    panels = pack_int4(weight)._replace(few=kernel, many=kernel)
    x = torch.randn(rows, shape[1]).to(dtype)
    bias, residual = torch.randn(shape[0]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
    largest = x.double().abs().amax(dim=1, keepdim=True)
    quantized = (x.double() * 127 / largest).round() * largest / 127
    plain = F.linear(quantized, dequantized(weight).double())
    for found, expected in (
        (panels.multiply(x, None, None), plain),
        (panels.multiply(x, bias, residual), plain + bias.double() + residual.double()),
    ):
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert not rows or error(found, expected) < 0.01
        torch.testing.assert_close(found.double(), expected, atol=0.02 * shape[1] ** 0.5, rtol=0.02)


@pytest.mark.skipif(len(quantized_kernels()) < 2, reason="this processor has one kernel")
def test_all_kernels_of_int4_give_the_same_bits() -> None:
    torch.manual_seed(0)
    packed, x = pack_int4(torch.randn(200, 300)), torch.randn(40, 300)
    first, *others = (
        packed._replace(few=name, many=name).multiply(x, None, None) for name in quantized_kernels()
    )
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=0)


@pytest.mark.skipif("vnni" not in quantized_kernels(), reason="this processor packs with torch")
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_packs_as_the_kernel_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed = pack_int4(weight)
    numbers, sums, scales = (torch.zeros_like(x) for x in (packed.numbers, packed.sums, packed.scales))
    pack_with_torch(weight, numbers, sums, scales)
    torch.testing.assert_close(scales, packed.scales)
    # Where two steps are as near, rounding decides.
    assert float((numbers != packed.numbers).float().mean()) < 0.001
