from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native.quantized_panels import pack_int8, quantized_kernels
from workers.nn.weights.dense import MakeLinear
from workers.nn.weights.int8 import FbgemmInt8Linear, Int8, Int8Linear, PanelLinear, make_int8_linear
from workers.nn.weights.processor import is_int8_exact, is_x86

DTYPES = [torch.float32, torch.bfloat16]


def by_kernels(weight: Tensor, bias: Tensor | None = None) -> PanelLinear:
    return PanelLinear(pack_int8(weight), bias)


INT8_KINDS = [
    Int8Linear,
    pytest.param(
        by_kernels, marks=pytest.mark.skipif(not quantized_kernels(), reason="no kernel on this processor")
    ),
    pytest.param(
        FbgemmInt8Linear,
        marks=pytest.mark.skipif(is_int8_exact() or not is_x86(), reason="not used here"),
    ),
]


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_int8_is_close_and_no_row_depends_on_another(
    rows: int,
    dtype: torch.dtype,
    kind: MakeLinear,
) -> None:
    torch.manual_seed(0)
    weight, bias, x = (
        torch.randn(96, 256).to(dtype),
        torch.randn(96).to(dtype),
        torch.randn(rows, 256).to(dtype),
    )
    linear = kind(weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    y = linear(x)
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < (0.015 if is_int8_exact() else 0.025)
    outlier = torch.full((1, 256), 1e4).to(dtype)
    assert torch.equal(linear(torch.cat([x, outlier]))[:rows], y), "an outlier spoils nobody else's result"
    torch.testing.assert_close(linear.add_to(y, x), y + y)


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_activation_keeps_its_sign(dtype: torch.dtype, kind: MakeLinear) -> None:
    linear = kind(torch.ones(4, 64).to(dtype))
    for value in torch.linspace(0.01, 500, 997).tolist():
        x = torch.zeros(1, 64).to(dtype)
        x[0, 0] = value
        torch.testing.assert_close(linear(x).float(), x[:, :1].float().expand(1, 4), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_int8_does_not_overflow_and_zero_is_zero(kind: MakeLinear) -> None:
    linear = kind(torch.ones(8, 512))
    assert torch.equal(linear(torch.zeros(2, 512)), torch.zeros(2, 8))
    torch.testing.assert_close(linear(torch.ones(2, 512)), torch.full((2, 8), 512.0))
    torch.testing.assert_close(linear(-torch.ones(2, 512)), torch.full((2, 8), -512.0))
    assert torch.isfinite(kind(torch.zeros(8, 64))(torch.ones(1, 64))).all()


def test_which_kind_a_weight_gets() -> None:
    by_torch = Int8Linear if is_int8_exact() or not is_x86() else FbgemmInt8Linear
    kind = PanelLinear if quantized_kernels() else by_torch
    assert type(make_int8_linear(torch.randn(50, 8))) is kind
    assert type(make_int8_linear(torch.randn(50, 8).half())) is by_torch


def test_it_is_for_the_cpu() -> None:
    Int8().check_device(torch.device("cpu"))
    with pytest.raises(ValueError, match="'int8' is for the CPU, but this worker computes on cuda:0"):
        Int8().check_device(torch.device("cuda", 0))
