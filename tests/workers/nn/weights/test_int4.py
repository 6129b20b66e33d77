from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.nn.native import operators
from workers.nn.native.int4 import dequantized
from workers.nn.native.quantized_panels import quantized_kernels
from workers.nn.weights.base import Linear
from workers.nn.weights.int4 import Int4, make_int4_linear
from workers.nn.weights.int8 import Int8Linear, PanelLinear
from workers.nn.weights.processor import is_int8_exact

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["kernels", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Linear]:
    """What `make_int4_linear` makes: with the compiled kernels, and in an installation without them."""
    if request.param == "torch":
        monkeypatch.setattr(operators, "kernels", None)
        return Int8Linear  # or its subclass for FBGEMM
    if not quantized_kernels():
        pytest.skip("no kernel for 4 bits on this processor")
    return PanelLinear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_int4_is_close_and_no_row_depends_on_another(
    rows: int, dtype: torch.dtype, kind: type[Linear]
) -> None:
    torch.manual_seed(0)
    weight, bias, x = (
        torch.randn(96, 256).to(dtype),
        torch.randn(96).to(dtype),
        torch.randn(rows, 256).to(dtype),
    )
    linear = make_int4_linear(weight, bias)
    assert isinstance(linear, kind)
    y = linear(x)
    assert y.dtype == dtype
    rounded = F.linear(x.double(), dequantized(weight).double(), bias.double())
    assert float((y.double() - rounded).norm() / rounded.norm()) < (0.02 if is_int8_exact() else 0.03)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert float((y.double() - expected).norm() / expected.norm()) < 0.1
    outlier = torch.full((1, 256), 1e4).to(dtype)
    assert torch.equal(linear(torch.cat([x, outlier]))[:rows], y), "an outlier spoils nobody else's result"
    torch.testing.assert_close(linear.add_to(y, x), y + y)


def test_zero_is_zero_and_weights_of_zero(kind: type[Linear]) -> None:
    linear = make_int4_linear(torch.ones(8, 512))
    assert not linear(torch.zeros(2, 512)).any()
    torch.testing.assert_close(linear(torch.ones(2, 512)), torch.full((2, 8), 512.0), rtol=0.07, atol=0)
    assert torch.isfinite(make_int4_linear(torch.zeros(8, 64))(torch.ones(1, 64))).all()


def test_float16_has_no_kernel_of_ours() -> None:
    linear = make_int4_linear(torch.ones(8, 64, dtype=torch.float16))
    x = torch.ones(1, 64, dtype=torch.float16)
    torch.testing.assert_close(linear(x), x.sum().expand(1, 8), rtol=0.07, atol=0)


def test_int4_is_for_the_cpu() -> None:
    Int4().check_device(torch.device("cpu"))
    with pytest.raises(ValueError, match="'int4' is for the CPU, but this worker computes on cuda:0"):
        Int4().check_device(torch.device("cuda", 0))
