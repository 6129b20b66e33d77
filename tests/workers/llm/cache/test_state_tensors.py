from __future__ import annotations

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


def test_without_states_a_step_has_none() -> None:
    assert StateTensors([], 2, torch.float32, CPU).of_step(torch.tensor([0]), [1], [0]) is None
