"""The compiled step of the delta rule beside torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.nn.native_versions import each_version
from workers.nn.delta.rule import DeltaTokens, advance, advance_slots, unit_heads
from workers.nn.native import operators

__all__ = ["each_version"]
NUM_SLOTS, HEADS = 5, 6


def make_tokens(num_rows: int, key_heads: int, key_dim: int, value_dim: int) -> DeltaTokens:
    q, k = (unit_heads(torch.randn(num_rows, key_heads, key_dim)) for _ in range(2))
    fade = -torch.rand(num_rows, HEADS)
    return DeltaTokens(q * 0.1, k, torch.randn(num_rows, HEADS, value_dim), fade, torch.rand(num_rows, HEADS))


def make_memory(key_dim: int, value_dim: int) -> Tensor:
    """Slots are strided: other states lie between them."""
    size = HEADS * key_dim * value_dim
    return torch.randn(NUM_SLOTS, size + 32)[:, :size].unflatten(1, (HEADS, key_dim, value_dim))


@pytest.mark.usefixtures("each_version")
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 16), (13, 48), (128, 128), (32, 144)])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_a_step_in_place_is_torchs(key_heads: int, key_dim: int, value_dim: int) -> None:
    torch.manual_seed(0)
    memory, slots = make_memory(key_dim, value_dim), torch.tensor([3, 0, 4])
    tokens = make_tokens(3, key_heads, key_dim, value_dim)
    # Factors 0 and shares 0, and what is nothing.
    tokens.fade[0, 0], tokens.share[1, 1] = -90.0, 0.0
    assert operators.takes_delta(memory)
    before, wanted = memory.clone(), memory[slots]
    out = advance(wanted, tokens)
    torch.testing.assert_close(advance_slots(memory, slots, tokens), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory[slots], wanted, rtol=1e-5, atol=1e-5)
    others = [1, 2]
    assert torch.equal(memory[others], before[others])


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(1)
    memory, slots, tokens = make_memory(16, 32), torch.tensor([2, 1, 0, 4]), make_tokens(4, 2, 16, 32)
    alone = memory.clone()
    together = advance_slots(memory, slots, tokens)
    for row in range(4):
        one = DeltaTokens(*(part[row : row + 1] for part in tokens))
        assert torch.equal(advance_slots(alone, slots[row : row + 1], one), together[row : row + 1])
    assert torch.equal(alone[slots], memory[slots])


def test_states_that_no_vector_divides_are_torchs() -> None:
    assert not operators.takes_delta(torch.zeros(2, HEADS, 8, 24))
    assert not operators.takes_delta(torch.zeros(2, HEADS, 8, 32, dtype=torch.bfloat16))
