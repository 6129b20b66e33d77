from __future__ import annotations

import pytest
import torch

from workers.llm.cache.spec import State
from workers.llm.cache.state_tensors import ALIGNMENT, StateTensors

CPU = torch.device("cpu")
STATES = [State((3, 5), None), State((2, 4, 4), torch.float32)]


def test_a_slot_is_of_the_models_type_where_a_state_says_nothing() -> None:
    first, second = StateTensors(STATES, 2, torch.bfloat16, CPU).tensors
    assert (first.shape, first.dtype) == ((3, 3, 5), torch.bfloat16)
    assert (second.shape, second.dtype) == ((3, 2, 4, 4), torch.float32)
    assert second.data_ptr() % ALIGNMENT == first.data_ptr() % ALIGNMENT
    assert second[0].is_contiguous()


def test_a_start_zeroes_all_states_of_the_slot_and_no_others() -> None:
    states = StateTensors(STATES, 2, torch.bfloat16, CPU)
    for tensor in states.tensors:
        tensor.fill_(1)
    states.start(1)
    assert [[bool(row.any()) for row in tensor] for tensor in states.tensors] == [[True, False, True]] * 2


def test_states_inside_a_step_are_copied_to_the_rows_of_snapshots() -> None:
    states = StateTensors(STATES, 2, torch.bfloat16, CPU, num_snapshots=4, num_drafts=5)
    of_step = states.of_step(torch.tensor([0, 1]), [200, 90], [0, 0], None, [[(64, 3), (128, 0)], []])
    assert of_step is not None
    assert of_step.saves == [[(64, 11), (128, 8)], []]
    for tensor in of_step.tensors:
        tensor[11] = 7
    states.restore(1, 3)
    assert all(bool((tensor[1] == 7).all()) for tensor in states.tensors)
    plain = states.of_step(torch.tensor([0]), [200], [0], None, [[]])
    assert plain is not None
    assert plain.saves is None


def test_without_states_a_step_has_none() -> None:
    assert StateTensors([], 2, torch.float32, CPU).of_step(torch.tensor([0]), [1], [0]) is None


def test_a_slot_goes_on_behind_the_drafts_that_were_right() -> None:
    states = StateTensors(STATES, 2, torch.bfloat16, CPU, num_snapshots=2, num_drafts=5)
    first, second = states.place_drafts([1, 0], [2, 3])
    assert (list(first), list(second)) == ([3, 4], [5, 6, 7]), "behind the spare slot"
    for tensor in states.tensors:
        tensor[:8].copy_(torch.arange(8).view(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor[:8]))
    states.save(0, 0)
    states.save(0, 1, 3)
    states.accept(1, 2)
    states.accept(0, 1)
    for tensor in states.tensors:
        assert tensor.flatten(1)[:8, 0].tolist() == [5, 4, 2, 3, 4, 5, 6, 7]
    states.restore(0, 0)
    states.restore(1, 1)
    for tensor in states.tensors:
        assert tensor.flatten(1)[:2, -1].tolist() == [0, 7]
    with pytest.raises(AssertionError, match="more drafts than rows"):
        states.place_drafts([0, 1], [3, 3])


def test_a_model_without_states_may_have_drafts() -> None:
    states = StateTensors([], 2, torch.float32, CPU)
    assert list(map(len, states.place_drafts([1, 0], [4, 0]))) == [4, 0]
    states.accept(1, 3)
