"""Compiled operators beside torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.nn.native_versions import each_version
from workers.nn.layers import rotary_tables, rotate
from workers.nn.native import operators

__all__ = ["each_version"]
pytestmark = pytest.mark.usefixtures("each_version")
DTYPES = [torch.float32, torch.bfloat16]


def check(found: Tensor, expected: Tensor) -> None:
    """`expected`: in float64."""
    tolerance = (1e-5, 1e-5) if found.dtype == torch.float32 else (1e-4, 2**-8)
    torch.testing.assert_close(found.double(), expected, atol=tolerance[0], rtol=tolerance[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 768), (5, 64), (300, 100), (2, 3, 7), (0, 32)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (100 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    check(
        operators.rms_norm(x, weight, 1e-6),
        weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
    )


@pytest.mark.parametrize("shape", [(5, 64), (300, 100)])
def test_rms_norm_with_a_weight_in_float32(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = (100 * torch.randn(shape)).bfloat16(), torch.randn(shape[-1])
    wide = x.double()
    expected = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    check(operators.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3072), (40, 1000), (3, 14)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (20 * torch.randn(shape)).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    check(operators.silu_mul(x), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (operators.quick_gelu_, lambda x: x * torch.sigmoid(1.702 * x)),
        (operators.gelu_tanh_, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_gelus(
    found: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.cat((5 * torch.randn(70, 500), torch.tensor([0.0, -100.0, 100.0, 1e-30] * 125)[None])).to(dtype)
    wanted = expected(x.double())
    assert found(x) is x
    check(x, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [72, 80, 64, 20])
def test_split_rotated(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv, angles = torch.randn(33, 3 * 4 * dim).to(dtype), torch.randn(33, dim // 2)
    q, k, v = qkv.unflatten(-1, (3, 4, dim)).unbind(1)
    tables = rotary_tables(angles, torch.float32)
    found = operators.split_rotated(qkv, *tables, 4)
    wide = [table.double() for table in tables]
    check(found[0], rotate(q.double(), *wide))
    check(found[1], rotate(k.double(), *wide))
    assert torch.equal(found[2], v)


def test_what_is_no_number_stays_none() -> None:
    x = torch.full((1, 32), torch.nan, dtype=torch.bfloat16)
    assert operators.silu_mul(x).isnan().all()
    assert operators.rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6).isnan().all()


def test_other_tensors_are_left_to_torch() -> None:
    x = torch.randn(4, 32)
    assert operators.takes(x, x)
    assert not operators.takes(x.t())
    assert not operators.takes(x.half())
    assert not operators.takes(x, x.bfloat16())
    assert not operators.takes(x.to("meta"))
