"""Both ways of adding to the residual stream, with features for some of the tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.llm.models.stream import make_stream
from workers.llm.parallel import TensorParallel
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm, silu_mul
from workers.nn.weights.dense import TorchLinear

HIDDEN = 8


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """What the kernel does (`workers/nn/kernels.py`)."""
    if delta is not None:
        x += delta
    return F.rms_norm(x, weight.shape, weight, eps)


def no_experts(*of_layer: object) -> Tensor:
    raise AssertionError("there are no experts")


KERNELS = Kernels(add_rms_norm, silu_mul, no_experts)


@pytest.mark.parametrize("kernels", [None, KERNELS], ids=["torch", "kernels"])
def test_what_is_added_is_in_the_next_norm(kernels: Kernels | None) -> None:
    torch.manual_seed(0)
    x, rows, values = torch.randn(5, HIDDEN), torch.tensor([3, 1]), torch.randn(2, HIDDEN)
    norm = RMSNorm(torch.rand(HIDDEN), 1e-6)
    linears = [TorchLinear(torch.randn(HIDDEN, HIDDEN)) for _ in range(3)]
    expected = x.clone()
    stream = make_stream(x.clone(), TensorParallel(), kernels)
    for linear in linears:
        expected = expected + linear(norm(expected))
        stream.project(linear, stream.normed(norm))
        expected[rows] += values
        stream.add_rows(rows, values)
    part = 2 * stream.normed(norm)
    expected = expected + part
    stream.add_part(part)
    torch.testing.assert_close(stream.normed(norm), norm(expected))
