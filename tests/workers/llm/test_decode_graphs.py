"""The buffers of padded decode steps: pure bookkeeping, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.messages import SequencePlan, pack_int32
from workers.llm.decode_graphs import DecodeBuffers, DecodeGraphs, Inputs, Outputs, graph_sizes, is_decode
from workers.llm.sampling.choice import NUM_PARAMS

CPU = torch.device("cpu")
BLOCK = 4


def plan(slot: int, token: int | None, position: int, num_computed: int, table: list[int]) -> SequencePlan:
    positions = np.full((3, 1), position, dtype=np.int32).tobytes()
    return SequencePlan(slot, pack_int32([] if token is None else [token]), positions, num_computed, pack_int32(table), (), is_sampled=True)


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 8, 64, 100, 256, 512])
def test_sizes_leave_little_empty(largest: int) -> None:
    sizes = graph_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, largest)
    for count in range(1, largest + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count <= size // 4 or size <= 8
    assert len(sizes) < 40


def test_steps_are_filled_up_with_rows_that_harm_nobody() -> None:
    seen: list[tuple[int, Inputs]] = []

    def compute(inputs: Inputs) -> Outputs:
        seen.append((len(inputs.slots), Inputs(*(part.clone() for part in inputs))))
        return Outputs(inputs.token_ids.long() + 1, torch.zeros(len(inputs.slots), 3))

    buffers = DecodeBuffers(8, 5, BLOCK, spare_request_slot=99, spare_kv_slot=400, device=CPU)
    graphs = DecodeGraphs(graph_sizes(8), buffers, compute, CPU)
    first = [plan(3, 11, 50, 9, [7, 2, 8, 1]), plan(0, None, 4, 4, [5, 6]), plan(6, 13, 0, 0, [9])]
    params = np.arange(3 * NUM_PARAMS, dtype=np.int32).reshape(NUM_PARAMS, 3)
    outputs = graphs.run(first, params)
    assert outputs.token_ids.tolist() == [12, 1, 14]
    size, inputs = seen.pop()
    assert size == 4
    assert inputs.token_ids.tolist() == [11, 0, 13, 0]
    assert inputs.is_late.tolist() == [0, 1, 0, 0]
    assert inputs.positions.tolist() == [50, 4, 0, 0]
    assert inputs.slots.tolist() == [3, 0, 6, 99]
    assert inputs.lengths.tolist() == [10, 5, 1, 1]
    assert inputs.new_slots.tolist() == [8 * BLOCK + 1, 6 * BLOCK, 9 * BLOCK, 400]
    assert inputs.params[:, :3].tolist() == params.tolist()
    assert inputs.params[0, 3] == 0, "rows of nobody are greedy"
    assert inputs.tables[:, :3].tolist() == [[7, 2, 8], [5, 6, 0], [9, 0, 0], [100] * 3], "who fills up reads what it writes"
    # A smaller step after it: nothing of the rows before is left where it would be read.
    graphs.run([plan(1, 5, 8, 8, [4, 3, 2])], params[:, :1])
    size, inputs = seen.pop()
    assert (size, inputs.tables[0, :3].tolist(), inputs.new_slots.tolist()) == (1, [4, 3, 2], [2 * BLOCK])
    graphs.run([*first, *first], np.zeros((NUM_PARAMS, 6), dtype=np.int32))
    size, inputs = seen.pop()
    assert (size, inputs.slots.tolist()) == (8, [3, 0, 6, 3, 0, 6, 99, 99])


def test_inputs_stay_where_they_are() -> None:
    buffers = DecodeBuffers(8, 5, BLOCK, 99, 400, CPU)
    before = [part.data_ptr() for part in buffers.inputs(4)]
    buffers.fill([plan(3, 11, 50, 9, [7, 2, 8, 1])], np.zeros((NUM_PARAMS, 1), dtype=np.int32), 4)
    assert [part.data_ptr() for part in buffers.inputs(4)] == before


def test_what_is_a_decode() -> None:
    decode = plan(0, 5, 7, 7, [1, 2])
    assert is_decode(decode)
    assert is_decode(plan(0, None, 7, 7, [1, 2])), "its token is not known yet"
    picture = SequencePlan(0, pack_int32([5]), pack_int32([7, 8, 9]), 7, pack_int32([1, 2]), (), is_sampled=True)
    assert not is_decode(picture), "positions of a picture differ"
    chunk = SequencePlan(0, pack_int32([5]), pack_int32([7, 7, 7]), 7, pack_int32([1, 2]), (), is_sampled=False)
    assert not is_decode(chunk)
    two = SequencePlan(0, pack_int32([5, 6]), pack_int32([7, 8, 7, 8, 7, 8]), 7, pack_int32([1, 2]), (), is_sampled=True)
    assert not is_decode(two)
