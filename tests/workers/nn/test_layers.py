from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.nn.layers import Linear, QuantizedLinear, RMSNorm, can_pack, is_int8_exact, rotary_tables, rotate

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_what_torch_computes(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 48).to(dtype), torch.randn(70).to(dtype) if has_bias else None
    x, residual = torch.randn(rows, 48).to(dtype), torch.randn(rows, 70).to(dtype)
    linear = Linear(weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)
    torch.testing.assert_close(linear.add_to(residual, x).double(), expected + residual.double(), **tolerance)
    assert (linear.in_features, linear.out_features) == (48, 70)


def test_float32_is_packed_on_this_cpu() -> None:
    assert can_pack(torch.zeros(4, 4))
    assert not can_pack(torch.zeros(4, 4, device="meta"))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_int8_is_close_and_no_row_depends_on_another(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 256).to(dtype), torch.randn(96).to(dtype), torch.randn(rows, 256).to(dtype)
    linear = QuantizedLinear(weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    y = linear(x)
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < (0.015 if is_int8_exact() else 0.025)
    outlier = torch.full((1, 256), 1e4).to(dtype)
    assert torch.equal(linear(torch.cat([x, outlier]))[:rows], y), "an outlier spoils nobody else's result"
    torch.testing.assert_close(linear.add_to(y, x), y + y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_activation_keeps_its_sign(dtype: torch.dtype) -> None:
    linear = QuantizedLinear(torch.ones(4, 64).to(dtype))
    for value in torch.linspace(0.01, 500, 997).tolist():
        x = torch.zeros(1, 64).to(dtype)
        x[0, 0] = value
        torch.testing.assert_close(linear(x).float(), x[:, :1].float().expand(1, 4), rtol=0.02, atol=1e-4)


def test_int8_does_not_overflow_and_zero_is_zero() -> None:
    linear = QuantizedLinear(torch.ones(8, 512))
    assert torch.equal(linear(torch.zeros(2, 512)), torch.zeros(2, 8))
    torch.testing.assert_close(linear(torch.ones(2, 512)), torch.full((2, 8), 512.0))
    torch.testing.assert_close(linear(-torch.ones(2, 512)), torch.full((2, 8), -512.0))
    assert torch.isfinite(QuantizedLinear(torch.zeros(8, 64))(torch.ones(1, 64))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (100 * torch.randn(5, 64)).to(dtype), torch.randn(64).to(dtype)
    wide = x.double()
    expected = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    torch.testing.assert_close(RMSNorm(weight, 1e-6)(x).double(), expected, **tolerance)


def test_rotation_turns_pairs_of_halves() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(7, 3, 16), torch.randn(7, 8)
    turned = rotate(x, *rotary_tables(angles, torch.float32))
    pairs = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], dim=-1))
