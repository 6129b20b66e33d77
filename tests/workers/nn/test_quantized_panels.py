"""Rows, quantised, times a weight in int8, by each kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native.quantized_panels import (
    PART,
    QuantizedPanels,
    pack_int8,
    quantized_kernels,
)
from workers.nn.weights.int8 import Int8Linear

KERNELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(name not in quantized_kernels(), reason=f"this processor has no {name}"),
    )
    for name in ("avx2", "vnni", "amx")
]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def panels_of(weight: Tensor, kernel: str) -> QuantizedPanels:
    return pack_int8(weight)._replace(few=kernel, many=kernel)


def whole_weight(rows: int, columns: int) -> Tensor:
    """Whole numbers that stay what they are, times the scales of their rows."""
    weight = torch.randint(-126, 127, (rows, columns)).float()
    weight[:, 0] = 127
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 16, 17, 33, 100])
@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (7, 2), (513, 1031), (1024, 768)])
def test_products(shape: tuple[int, int], kernel: str, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = whole_weight(*shape) * 2.0 ** torch.randint(-4, 1, (shape[0], 1))
    panels = panels_of(weight, kernel)
    x = torch.randn(rows, shape[1]).to(dtype)
    bias, residual = 100 * torch.randn(shape[0]).to(dtype), 100 * torch.randn(rows, shape[0]).to(dtype)
    largest = x.double().abs().amax(dim=1, keepdim=True)
    quantized = (x.double() * 127 / largest).round() * largest / 127
    plain = F.linear(quantized, weight.double())
    loose = {"atol": 0.5 * shape[1] ** 0.5, "rtol": 0.02}  # a number between two may be rounded to either
    for found, expected in (
        (panels.multiply(x, None, None), plain),
        (panels.multiply(x, bias, None), plain + bias.double()),
        (panels.multiply(x, bias, residual), plain + bias.double() + residual.double()),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **loose)
        assert float((found.double() - expected).norm() / expected.norm()) < 0.01


def test_a_row_of_zeros_and_an_outlier(kernel: str) -> None:
    torch.manual_seed(0)
    weight = whole_weight(70, 100)
    panels = panels_of(weight, kernel)
    x = torch.zeros(3, 100)
    x[1, 5] = 1e6
    x[2] = torch.randint(-127, 128, (100,)).float()
    x[2, 0] = 127
    found = panels.multiply(x, None, None)
    assert not found[0].any()
    torch.testing.assert_close(found[1:], x[1:] @ weight.t())


def test_rows_that_do_not_lie_side_by_side(kernel: str) -> None:
    torch.manual_seed(0)
    panels = panels_of(torch.randn(70, 64), kernel)
    wide, residual = torch.randn(4, 128), torch.randn(70, 4).t()
    found = panels.multiply(wide[:, ::2], None, residual)
    torch.testing.assert_close(found, panels.multiply(wide[:, ::2].contiguous(), None, residual.contiguous()))


def test_a_row_with_what_is_no_number_has_no_other_numbers(kernel: str) -> None:
    panels = panels_of(torch.ones(70, 100), kernel)
    x = torch.ones(2, 100)
    x[0, 37] = float("nan")
    found = panels.multiply(x, None, None)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], torch.full((70,), 100.0))


def test_float16_is_left_to_onednn() -> None:
    x = torch.ones(1, 64, dtype=torch.float16)
    torch.testing.assert_close(Int8Linear(torch.ones(8, 64, dtype=torch.float16))(x), x.sum().expand(1, 8))


@pytest.mark.skipif(not quantized_kernels(), reason="no kernel for 8 bits on this processor")
def test_large_weights_are_packed_in_parts_as_small_ones() -> None:
    weight = torch.randn(2 * PART + 70, 100).bfloat16()
    whole, parts = pack_int8(weight), [pack_int8(part) for part in weight.split(PART)]
    for name in ("numbers", "sums", "scales"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_no_rows(kernel: str) -> None:
    panels = panels_of(torch.ones(70, 100), kernel)
    assert panels.multiply(torch.ones(0, 100), None, None).shape == (0, 70)


@pytest.mark.skipif(len(quantized_kernels()) < 2, reason="this processor has one kernel")
def test_all_kernels_give_the_same_bits() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, 300), torch.randn(40, 300)
    first, *others = (panels_of(weight, name).multiply(x, None, None) for name in quantized_kernels())
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=0)
