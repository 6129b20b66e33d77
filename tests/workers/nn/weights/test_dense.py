from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.nn.weights.dense import HalfLinear, OneDnnLinear, TorchLinear, is_half_exact, make_linear
from workers.nn.weights.processor import can_pack, has_fbgemm, is_x86

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
    rows: int,
    has_bias: bool,
    source: torch.dtype,
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(130, 600).to(source).float(), torch.randn(130) if has_bias else None
    x, residual = torch.randn(rows, 600), torch.randn(rows, 130)
    linear = make_linear(weight, bias)
    assert type(linear) is HalfLinear
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        linear.add_to(residual, x).double(),
        expected + residual.double(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_which_kind_a_weight_gets() -> None:
    torch.manual_seed(0)
    # The x86 wheels of torch have it: without it decode is half as fast on most laptops.
    assert has_fbgemm() == is_x86()
    exact = torch.randn(5000, 8).half().float()
    assert type(make_linear(exact)) is (HalfLinear if is_x86() else OneDnnLinear)
    assert type(make_linear(torch.randn(5000, 8))) is OneDnnLinear, "float16 would round it"
    assert type(make_linear(exact.double())) is TorchLinear
    assert type(make_linear(exact.to("meta"))) is TorchLinear
    assert not can_pack(torch.float64)


def test_float16_holds_weights_of_bfloat16_checkpoints_but_no_others() -> None:
    assert is_half_exact(
        (0.02 * torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))).bfloat16().float(),
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
