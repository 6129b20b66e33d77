"""The kernels of experts in the interpreter, against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.expert_kernels import _plan, experts

pytestmark = pytest.mark.interpreter

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def choose(num_tokens: int, num_experts: int, num_chosen: int) -> Tensor:
    return torch.stack([torch.randperm(num_experts)[:num_chosen] for _ in range(num_tokens)])


def reference(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, shares: Tensor, first: int) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, share in zip(chosen[token].tolist(), shares[token].tolist(), strict=True):
            if first <= expert < first + len(down):
                gate, up = (gate_up[expert - first].double() @ row).chunk(2)
                out[token] += share * (down[expert - first].double() @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen", "held"),
    [(1, 8, 2, (0, 8)), (5, 8, 3, (0, 8)), (5, 8, 3, (4, 8)), (40, 4, 2, (0, 4)), (70, 3, 2, (1, 2))],
)
def test_every_token_gets_its_experts(
    num_tokens: int, num_experts: int, num_chosen: int, held: tuple[int, int], dtype: torch.dtype
) -> None:
    """Sizes that are no multiple of a tile; experts of other ranks; few rows an expert and many."""
    torch.manual_seed(num_tokens)
    hidden, size, count = 72, 40, held[1] - held[0]
    x = torch.randn(num_tokens, hidden).to(dtype)
    gate_up = (torch.randn(count, 2 * size, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(count, hidden, size) / size**0.5).to(dtype)
    chosen, shares = choose(num_tokens, num_experts, num_chosen), torch.rand(num_tokens, num_chosen).to(dtype)
    expected = reference(x, gate_up, down, chosen, shares, held[0])
    out = experts(x, gate_up, down, chosen, shares, held[0])
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_tokens", [1, 3, 30, 700])
@pytest.mark.parametrize("is_skewed", [False, True])
def test_blocks_cover_every_choice_once(num_tokens: int, is_skewed: bool) -> None:
    """Also where all tokens choose the same experts, and across several tiles of choices."""
    torch.manual_seed(0)
    num_experts, first, count, rows = 16, 4, 8, 16
    chosen = choose(num_tokens, num_experts, 4)
    if is_skewed:
        chosen = torch.tensor([[11, 4, 2, 15]]).expand(num_tokens, -1).contiguous()
    order, blocks = _plan(chosen, count, first, rows)
    seen = []
    for expert, start, stop in blocks.tolist():
        for position in range(start, min(start + rows, stop)):
            choice = int(order[position])
            assert int(chosen.flatten()[choice]) == first + expert
            seen.append(choice)
    held = [c for c, e in enumerate(chosen.flatten().tolist()) if first <= e < first + count]
    assert sorted(seen) == held
