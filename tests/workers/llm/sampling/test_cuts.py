from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import draw_many
from tests.workers.llm.sampling.test_choice import kept_by_definition
from workers.llm.sampling.cuts import least_probable


def drawn_tokens(**params: float) -> set[int]:
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    return set(draw_many(probs.log(), SamplingParams(seed=3, **params), 3000))


def kept(logits: Tensor, *, top_k: float | None = None, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """What is left with a probability at all."""
    probs = logits[None].double().softmax(-1)
    cuts = (
        torch.tensor([[value]], dtype=torch.float64) for value in (top_k or logits.shape[-1], top_p, min_p)
    )
    return set((probs >= least_probable(probs, *cuts))[0].nonzero()[:, 0].tolist())


def test_top_k_keeps_the_best() -> None:
    assert drawn_tokens(top_k=1) == {1}
    assert drawn_tokens(top_k=2) == {1, 3}
    assert drawn_tokens(top_k=0) == drawn_tokens(top_k=-1) == drawn_tokens(top_k=50) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert drawn_tokens(top_p=0.4) == {1}
    assert drawn_tokens(top_p=0.51) == {1, 3}
    assert drawn_tokens(top_p=0.85) == {0, 1, 3}
    assert drawn_tokens(top_p=1e-9) == {1}
    assert drawn_tokens(top_p=0.51, top_k=1) == {1}
    assert drawn_tokens(top_p=0.6, top_k=2) == {1}, "of what top_k keeps, 0.5 of 0.8 is enough"


def test_min_p_keeps_what_is_near_the_best() -> None:
    assert drawn_tokens(min_p=0.31) == {1, 3}
    assert drawn_tokens(min_p=0.2) == {0, 1, 3}
    assert drawn_tokens(min_p=1.0) == {1}


def test_tokens_of_equal_probability_are_kept_together() -> None:
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0])
    assert kept(logits, top_k=2) == {0, 1, 2, 3}
    assert kept(logits, top_p=0.6) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "params",
    [{"top_p": 0.999}, {"top_p": 0.7}, {"top_k": 1500}, {"top_k": 1200, "top_p": 0.95}, {"min_p": 0.01}],
)
def test_a_flat_distribution_over_many_tokens_is_cut_as_defined(params: dict[str, float]) -> None:
    """More tokens are kept than are sorted first; the definition, token by token in Python, says which."""
    torch.manual_seed(0)
    logits = torch.randn(3000)
    expected = set(kept_by_definition(logits, params))
    drawn = set(draw_many(logits, SamplingParams(seed=3, **params), 2000))
    assert drawn <= expected
    assert len(drawn) > 0.2 * len(expected)
    assert kept(logits, **params) == expected


def test_a_top_k_beyond_what_is_sorted_first_counts_as_the_whole_for_top_p() -> None:
    counts = ((1024, 0.905), (976, 0.045), (4000, 0.05))
    probs = torch.cat([torch.full((count,), share / count) for count, share in counts]).double()
    probs -= torch.linspace(0, 1e-9, 6000).double()  # no two alike
    left = kept(probs.log(), top_k=2000, top_p=0.9)
    assert abs(len(left) - 968) <= 1, "0.9 of the 0.95 that top_k keeps"
