"""The buffers of padded decode steps: pure bookkeeping, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep
from workers.llm.decode_graphs import (
    DecodeBuffers,
    DecodeGraphs,
    DeviceTables,
    GraphInputs,
    Outputs,
    graph_sizes,
)
from workers.llm.sampling.choice import NUM_PARAMS
from workers.llm.sequences import SequenceTable

CPU = torch.device("cpu")
BLOCK = 4
SPARE = 99
GREEDY = SamplingParams(temperature=0, seed=1)


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 8, 64, 100, 256, 512])
def test_sizes_leave_little_empty(largest: int) -> None:
    sizes = graph_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, largest)
    for count in range(1, largest + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count <= size // 4 or size <= 8
    assert len(sizes) < 40


def table(*sequences: tuple[int, int, int, list[int]]) -> SequenceTable:
    """With (slot, position delta, number of computed tokens, block table) of each."""
    made = SequenceTable(SPARE, 5)
    for slot, delta, num_computed, blocks in sequences:
        known = pack_int32(range(num_computed + 1))
        start = SequenceStart(
            slot,
            num_computed + 1,
            GREEDY,
            known,
            b"",
            delta,
            num_computed,
            pack_int32(blocks),
        )
        made.start(start)
    return made


def test_steps_are_filled_up_with_rows_that_harm_nobody() -> None:
    seen: list[tuple[int, GraphInputs, torch.Tensor]] = []

    def compute(inputs: GraphInputs) -> Outputs:
        copies = GraphInputs(*(part.clone() for part in inputs))
        seen.append((len(inputs.slots), copies, buffers.device_tables.tables[inputs.slots.long()]))
        return Outputs(
            inputs.slots.long() + 1, torch.zeros(len(inputs.slots), 3), torch.zeros(len(inputs.slots), 2)
        )

    sequences = table((3, 41, 9, [7, 2, 8, 1]), (0, 0, 4, [5, 6]), (6, 0, 0, [9]), (1, 0, 8, [4, 3, 2]))
    buffers = DecodeBuffers(8, sequences, BLOCK, spare_kv_slot=400, device=CPU)
    graphs = DecodeGraphs(graph_sizes(8), buffers, compute, CPU)
    first = sequences.rows([SequenceStep(3), SequenceStep(0), SequenceStep(6)])
    assert graphs.can_run(first)
    params = np.arange(3 * NUM_PARAMS, dtype=np.int32).reshape(NUM_PARAMS, 3)
    assert graphs.run(first, params).token_ids.tolist() == [4, 1, 7]
    size, inputs, tables = seen.pop()
    assert size == 4
    assert inputs.positions.tolist() == [50, 4, 0, 0]
    assert inputs.slots.tolist() == [3, 0, 6, SPARE]
    assert inputs.lengths.tolist() == [10, 5, 1, 1]
    assert inputs.new_slots.tolist() == [8 * BLOCK + 1, 6 * BLOCK, 9 * BLOCK, 400]
    assert inputs.params[:, :3].tolist() == params.tolist()
    assert inputs.params[0, 3] == 0, "rows of nobody are greedy"
    # Who fills up reads what it writes.
    assert tables[:, :3].tolist() == [[7, 2, 8], [5, 6, 0], [9, 0, 0], [100] * 3]
    # A smaller step after it: nothing of the rows before is left where it would be read.
    graphs.run(sequences.rows([SequenceStep(1)]), params[:, :1])
    size, inputs, tables = seen.pop()
    assert (size, tables[0, :3].tolist(), inputs.new_slots.tolist()) == (1, [4, 3, 2], [2 * BLOCK])
    graphs.run(
        sequences.rows([SequenceStep(slot) for slot in (3, 0, 6, 1, 3, 0)]),
        np.zeros((NUM_PARAMS, 6), dtype=np.int32),
    )
    size, inputs, _ = seen.pop()
    assert (size, inputs.slots.tolist()) == (8, [3, 0, 6, 1, 3, 0, SPARE, SPARE])


def test_inputs_stay_where_they_are() -> None:
    sequences = table((3, 0, 9, [7, 2, 8, 1]))
    buffers = DecodeBuffers(8, sequences, BLOCK, 400, CPU)
    before = [part.data_ptr() for part in buffers.inputs(4)]
    buffers.fill(sequences.rows([SequenceStep(3)]), np.zeros((NUM_PARAMS, 1), dtype=np.int32), 4)
    assert [part.data_ptr() for part in buffers.inputs(4)] == before


def test_the_device_hears_of_new_blocks_only() -> None:
    sequences = table((1, 0, 3, [7]), (2, 0, 3, [4]))
    tables = DeviceTables(sequences, 100, CPU)
    both = np.array([1, 2])
    tables.update(both)
    assert tables.tables[1:3, :2].tolist() == [[7, 0], [4, 0]]
    sequences.extend(2, np.array([6], dtype=np.int32))
    sequences.block_tables[:, 0] = -1  # what the device has is not read again
    tables.update(both)
    assert tables.tables[1:3, :2].tolist() == [[7, 0], [4, 6]]
    sequences.start(SequenceStart(1, 1, GREEDY, pack_int32([5]), block_table=pack_int32([9, 8])))
    tables.restart(1)
    tables.update(both)
    assert tables.tables[1:3, :2].tolist() == [[9, 8], [4, 6]], "another sequence has the slot"
