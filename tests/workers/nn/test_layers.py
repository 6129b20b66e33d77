from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.nn.layers import (
    FbgemmInt8Linear,
    HalfLinear,
    Int8Linear,
    Linear,
    OneDnnLinear,
    RMSNorm,
    can_pack,
    has_fbgemm,
    is_half_exact,
    is_int8_exact,
    is_x86,
    make_int8_linear,
    make_linear,
    rotary_tables,
    rotate,
)  # fmt: skip

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_what_torch_computes(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 48).to(dtype), torch.randn(70).to(dtype) if has_bias else None
    x, residual = torch.randn(rows, 48).to(dtype), torch.randn(rows, 70).to(dtype)
    linear = make_linear(weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)
    torch.testing.assert_close(linear.add_to(residual, x).double(), expected + residual.double(), **tolerance)
    assert (linear.in_features, linear.out_features) == (48, 70)


@pytest.mark.skipif(not is_x86(), reason="FBGEMM is for x86")
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 6, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weights_of_16_bits_stay_in_16_bits_and_the_arithmetic_in_32(
    rows: int, has_bias: bool, source: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(130, 600).to(source).float(), torch.randn(130) if has_bias else None
    x, residual = torch.randn(rows, 600), torch.randn(rows, 130)
    linear = make_linear(weight, bias)
    assert type(linear) is HalfLinear
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        linear.add_to(residual, x).double(), expected + residual.double(), atol=1e-4, rtol=1e-4
    )


def test_which_kind_a_weight_gets() -> None:
    torch.manual_seed(0)
    assert has_fbgemm() == is_x86(), (
        "the x86 wheels of torch have it: without it decode is half as fast on most laptops"
    )
    exact = torch.randn(5000, 8).half().float()
    assert type(make_linear(exact)) is (HalfLinear if is_x86() else OneDnnLinear)
    assert type(make_linear(torch.randn(5000, 8))) is OneDnnLinear, "float16 would round it"
    assert type(make_linear(exact.double())) is Linear
    assert type(make_linear(exact.to("meta"))) is Linear
    assert type(make_int8_linear(exact)) is (
        Int8Linear if is_int8_exact() or not is_x86() else FbgemmInt8Linear
    )
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float64))


def test_float16_holds_weights_of_bfloat16_checkpoints_but_no_others() -> None:
    assert is_half_exact(
        (0.02 * torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    )
    for value, is_exact in (
        (65504.0, True),
        (65536.0, False),
        (1e-6, True),
        (1.0 + 2**-12, False),
        (float("nan"), False),
        (float("inf"), False),
    ):
        weight = torch.zeros(5000, 2)
        weight[0, 0], weight[4999, 1] = 0.5, value
        assert is_half_exact(weight) == is_exact, value
    assert is_half_exact(torch.zeros(3, 3))
    tiny = 1e-6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert not is_half_exact(tiny), "all are so small that float16 would ruin them"


INT8_KINDS = [
    Int8Linear,
    pytest.param(
        FbgemmInt8Linear, marks=pytest.mark.skipif(is_int8_exact() or not is_x86(), reason="not used here")
    ),
]


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_int8_is_close_and_no_row_depends_on_another(
    rows: int, dtype: torch.dtype, kind: type[Int8Linear]
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
def test_the_largest_activation_keeps_its_sign(dtype: torch.dtype, kind: type[Int8Linear]) -> None:
    linear = kind(torch.ones(4, 64).to(dtype))
    for value in torch.linspace(0.01, 500, 997).tolist():
        x = torch.zeros(1, 64).to(dtype)
        x[0, 0] = value
        torch.testing.assert_close(linear(x).float(), x[:, :1].float().expand(1, 4), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_int8_does_not_overflow_and_zero_is_zero(kind: type[Int8Linear]) -> None:
    linear = kind(torch.ones(8, 512))
    assert torch.equal(linear(torch.zeros(2, 512)), torch.zeros(2, 8))
    torch.testing.assert_close(linear(torch.ones(2, 512)), torch.full((2, 8), 512.0))
    torch.testing.assert_close(linear(-torch.ones(2, 512)), torch.full((2, 8), -512.0))
    assert torch.isfinite(kind(torch.zeros(8, 64))(torch.ones(1, 64))).all()


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
