"""Rows, quantised, times a weight in int8, by each kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native.quantized_panels import (
    ANY,
    PART,
    QuantizedPanels,
    pack_int8,
    quantized_kernels,
)
from workers.nn.weights.int8 import Int8Linear

# Rows that the kernel for VNNI takes: all, or none, which is left to AMX.
FEW = [
    ANY,
    pytest.param(0, marks=pytest.mark.skipif("amx" not in quantized_kernels(), reason="has no AMX-INT8")),
]


@pytest.fixture(autouse=True)
def has_kernels() -> None:
    if not quantized_kernels():
        pytest.skip("no kernel for 8 bits on this processor")


def panels_of(weight: Tensor, few: int) -> QuantizedPanels:
    return pack_int8(weight)._replace(few=few)


def whole_weight(rows: int, columns: int) -> Tensor:
    """Whole numbers that stay what they are, times the scales of their rows."""
    weight = torch.randint(-126, 127, (rows, columns)).float()
    weight[:, 0] = 127
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 16, 17, 33, 100])
@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (7, 2), (513, 1031), (1024, 768)])
def test_products(shape: tuple[int, int], few: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = whole_weight(*shape) * 2.0 ** torch.randint(-4, 1, (shape[0], 1))
    panels = panels_of(weight, few)
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


@pytest.mark.parametrize("few", FEW)
def test_a_row_of_zeros_and_an_outlier(few: int) -> None:
    torch.manual_seed(0)
    weight = whole_weight(70, 100)
    panels = panels_of(weight, few)
    x = torch.zeros(3, 100)
    x[1, 5] = 1e6
    x[2] = torch.randint(-127, 128, (100,)).float()
    x[2, 0] = 127
    found = panels.multiply(x, None, None)
    assert not found[0].any()
    torch.testing.assert_close(found[1:], x[1:] @ weight.t())


@pytest.mark.parametrize("few", FEW)
def test_rows_that_do_not_lie_side_by_side(few: int) -> None:
    torch.manual_seed(0)
    panels = panels_of(torch.randn(70, 64), few)
    wide, residual = torch.randn(4, 128), torch.randn(70, 4).t()
    found = panels.multiply(wide[:, ::2], None, residual)
    torch.testing.assert_close(found, panels.multiply(wide[:, ::2].contiguous(), None, residual.contiguous()))


@pytest.mark.parametrize("few", FEW)
def test_a_row_with_what_is_no_number_has_no_other_numbers(few: int) -> None:
    panels = panels_of(torch.ones(70, 100), few)
    x = torch.ones(2, 100)
    x[0, 37] = float("nan")
    found = panels.multiply(x, None, None)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], torch.full((70,), 100.0))


def test_float16_is_left_to_onednn() -> None:
    x = torch.ones(1, 64, dtype=torch.float16)
    torch.testing.assert_close(Int8Linear(torch.ones(8, 64, dtype=torch.float16))(x), x.sum().expand(1, 8))


def test_large_weights_are_packed_in_parts_as_small_ones() -> None:
    weight = torch.randn(2 * PART + 70, 100).bfloat16()
    whole, parts = pack_int8(weight), [pack_int8(part) for part in weight.split(PART)]
    for name in ("numbers", "sums", "scales"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("few", FEW)
def test_no_rows(few: int) -> None:
    panels = panels_of(torch.ones(70, 100), few)
    assert panels.multiply(torch.ones(0, 100), None, None).shape == (0, 70)
