"""The Triton kernels in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.nn.kernels import add_rms_norm, silu_mul

pytestmark = pytest.mark.interpreter

SIZES = [(1, 64), (3, 96), (5, 1536)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), SIZES)
@pytest.mark.parametrize("has_delta", [False, True])
def test_add_rms_norm(rows: int, size: int, has_delta: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(rows, size)).to(dtype), torch.randn(size).to(dtype)
    delta = torch.randn(rows, size).to(dtype) if has_delta else None
    residual = x.clone() if delta is None else x + delta
    out = add_rms_norm(x, delta, weight, 1e-6)
    torch.testing.assert_close(x, residual)
    expected = F.rms_norm(residual.double(), (size,), weight.double(), 1e-6)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), [*SIZES, (2, 1100)])
def test_silu_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(rows, 2 * size)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(
        silu_mul(gate_up).double(), F.silu(gate) * up, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
