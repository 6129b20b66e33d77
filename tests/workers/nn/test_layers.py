from __future__ import annotations

import pytest
import torch

from workers.nn.layers import RMSNorm, rotary_tables, rotate

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (100 * torch.randn(5, 64)).to(dtype), torch.randn(64).to(dtype)
    wide = x.double()
    expected = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    torch.testing.assert_close(RMSNorm(weight, 1e-6)(x).double(), expected, **tolerance)


def test_a_weight_may_have_more_digits_than_what_is_normed() -> None:
    """To the nearest number of bfloat16: it is rounded once."""
    torch.manual_seed(0)
    x, weight = (100 * torch.randn(50, 70)).bfloat16(), 1 + 1e-3 * torch.randn(70)
    wide = x.double()
    expected = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    found = RMSNorm(weight, 1e-6)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=1e-30, rtol=2**-8)
    assert (found == expected.bfloat16()).double().mean() > 0.99


def test_a_weight_may_have_fewer_digits_than_what_is_normed() -> None:
    """As in its own type: there is no kernel for it."""
    torch.manual_seed(0)
    x, weight = 100 * torch.randn(50, 70), torch.randn(70).bfloat16()
    found = RMSNorm(weight, 1e-6)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, RMSNorm(weight, 1e-6)(x.bfloat16()).float(), rtol=0, atol=0)


def test_rotation_turns_pairs_of_halves() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(7, 3, 16), torch.randn(7, 8)
    turned = rotate(x, *rotary_tables(angles, torch.float32))
    pairs = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], dim=-1))
