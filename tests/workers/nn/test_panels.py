"""A few rows times a weight that oneDNN has packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.nn.native.panels import panels_of
from workers.nn.weights.dense import OneDnnLinear
from workers.nn.weights.processor import can_pack


@pytest.fixture(autouse=True)
def has_panels() -> None:
    if not can_pack(torch.bfloat16):
        pytest.skip("this processor does not compute in bfloat16")
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(32, 32, dtype=torch.bfloat16), None)
    if panels_of(packed) is None:
        pytest.skip("no kernel reads what oneDNN packs on this processor")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 12, 16, 37])
@pytest.mark.parametrize("shape", [(32, 32), (100, 60), (7, 2), (513, 1030), (2048, 768)])
def test_products_of_a_few_rows(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape).bfloat16(), torch.randn(rows, shape[1]).bfloat16()
    bias, residual = torch.randn(shape[0]).bfloat16(), torch.randn(rows, shape[0]).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    panels = panels_of(packed)
    assert panels is not None
    plain = F.linear(x.double(), weight.double())
    for found, expected in (
        (panels.multiply(x, None, None), plain),
        (panels.multiply(x, bias, None), plain + bias.double()),
        (panels.multiply(x, None, residual), plain + residual.double()),
        (panels.multiply(x, bias, residual), plain + bias.double() + residual.double()),
    ):
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2**-8)


def test_rows_do_not_change_each_other() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, 770).bfloat16(), torch.randn(12, 770).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    panels = panels_of(packed)
    assert panels is not None
    together = panels.multiply(x, None, None)
    assert all(
        torch.equal(panels.multiply(row[None], None, None), y[None])
        for row, y in zip(x, together, strict=True)
    )


def test_an_odd_number_of_inputs_is_left_to_onednn() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 33).bfloat16(), torch.randn(1, 33).bfloat16()
    assert panels_of(torch.ops.mkldnn._reorder_linear_weight(weight, None)) is None
    expected = F.linear(x.double(), weight.double())
    torch.testing.assert_close(OneDnnLinear(weight)(x).double(), expected, atol=1e-3, rtol=2**-7)


def test_one_row_and_many_are_alike() -> None:
    torch.manual_seed(0)
    linear = OneDnnLinear(torch.randn(200, 96).bfloat16(), torch.randn(200).bfloat16())
    x, residual = torch.randn(20, 96).bfloat16(), torch.randn(20, 200).bfloat16()
    for found, many in (
        (torch.cat([linear(row[None]) for row in x]), linear(x)),
        (torch.cat([linear.add_to(r[None], row[None]) for r, row in zip(residual, x, strict=True)]),
         linear.add_to(residual, x)),
    ):  # fmt: skip
        torch.testing.assert_close(found.float(), many.float(), atol=0.15, rtol=2**-6)
