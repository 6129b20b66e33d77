"""Steps in which every sequence decodes, in batches of a few sizes: as CUDA graphs, since a launch costs more
than most of what is launched.

All that changes from step to step lies in buffers that stay where they are. Without a GPU the same code runs
uncaptured. The host copies a few numbers a sequence: its block table is on the device already.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.llm.sampling.choice import NUM_PARAMS
from workers.llm.sequences import SequenceTable, StepRows
from workers.nn.loader import to_device

FIELDS = ("positions", "slots", "lengths", "new_slots")
NUM_STAGINGS = 2  # one is filled while the other may still be on its way to the GPU
NUM_WARM_UPS = 2  # kernels are compiled, and libraries take their memory, outside of a graph


def graph_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, … in steps that leave at most a quarter of a batch empty from 8 on, up to `largest`."""
    bases = (8 << power for power in range(12))
    steps = itertools.chain((1, 2, 4), (base * quarters // 4 for base in bases for quarters in (4, 5, 6, 7)))
    return [*itertools.takewhile(lambda size: size < largest, steps), largest]


class GraphInputs(NamedTuple):
    """What a batch of `n` reads, all on the device.

    Rows that fill it up belong to nobody: a spare slot, and one token at a spare place.
    """

    positions: Tensor  # [n] int32
    slots: Tensor  # [n] int32: of the requests
    lengths: Tensor  # [n] int32, the new token included
    new_slots: Tensor  # [n] int32: where its key and value go
    params: Tensor  # [NUM_PARAMS, n] int32, for the sampling kernel


class Outputs(NamedTuple):
    token_ids: Tensor  # [n] int64
    logits: Tensor  # [n, vocab] float32


class DeviceTables:
    """The block tables by slot, on the device. New blocks are written in the order of its stream."""

    def __init__(self, sequences: SequenceTable, spare_block: int, device: torch.device) -> None:
        self._sequences, self._device = sequences, device
        shape = sequences.block_tables.shape
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)  # [num_slots + 1, most blocks]
        self.tables[sequences.spare_slot] = spare_block
        self._num_written = np.zeros(len(sequences.num_blocks), dtype=np.int64)

    def restart(self, slot: int) -> None:
        """Another sequence has the slot: nothing of its table is here."""
        self._num_written[slot] = 0

    def update(self, slots: npt.NDArray[np.int64]) -> None:
        """Writes what these slots have got since they were last seen here; mostly that is nothing."""
        num_blocks = self._sequences.num_blocks
        grown = slots[self._num_written[slots] < num_blocks[slots]]
        if not len(grown):
            return
        width = self.tables.shape[1]
        parts = [np.arange(self._num_written[slot], num_blocks[slot]) + slot * width for slot in grown]
        places = np.concatenate(parts)
        blocks = self._sequences.block_tables.reshape(-1)[places]
        self.tables.view(-1)[to_device(places, self._device)] = to_device(blocks, self._device)
        self._num_written[grown] = num_blocks[grown]


class DecodeBuffers:
    """Page-locked memory that steps are written to, and its image on the device."""

    def __init__(
        self,
        largest: int,
        sequences: SequenceTable,
        block_size: int,
        spare_kv_slot: int,
        device: torch.device,
    ) -> None:
        self._sequences, self._block_size, self._spare_kv_slot = sequences, block_size, spare_kv_slot
        is_cuda = device.type == "cuda"
        shape = (len(FIELDS) + NUM_PARAMS, largest)
        zeros = functools.partial(torch.zeros, shape, dtype=torch.int32)
        self._staged = [zeros(pin_memory=is_cuda) for _ in range(NUM_STAGINGS)]
        self._turn = 0
        self._rows = torch.zeros(shape, dtype=torch.int32, device=device)
        self.device_tables = DeviceTables(sequences, spare_kv_slot // block_size, device)

    def inputs(self, size: int) -> GraphInputs:
        """The same memory at each call."""
        rows = self._rows[:, :size]
        positions, slots, lengths, new_slots = rows[: len(FIELDS)]
        return GraphInputs(positions, slots, lengths, new_slots, rows[len(FIELDS) :])

    def fill(self, of_step: StepRows, params: npt.NDArray[np.int32], size: int) -> None:
        """Starts the copy of a step, filled up to `size`; `params` [NUM_PARAMS, number of sequences]."""
        self._turn = (self._turn + 1) % NUM_STAGINGS
        rows = self._staged[self._turn].numpy()
        sequences, block_size = self._sequences, self._block_size
        count, starts = len(of_step.slots), of_step.starts
        positions, slots, lengths, new_slots = rows[: len(FIELDS)]
        rows[:, count:size] = 0  # temperature 0 is the cheapest way to choose
        slots[count:size], lengths[count:size] = sequences.spare_slot, 1
        new_slots[count:size] = self._spare_kv_slot
        slots[:count], lengths[:count] = of_step.slots, starts + 1
        positions[:count] = starts + sequences.position_deltas[of_step.slots]
        blocks = sequences.block_tables[of_step.slots, starts // block_size]
        new_slots[:count] = blocks * block_size + starts % block_size
        rows[len(FIELDS) :, :count] = params
        self._rows.copy_(self._staged[self._turn], non_blocking=True)
        self.device_tables.update(of_step.slots)


class DecodeGraphs:
    """Runs `compute` for batches of these sizes: captured where the device is a GPU, as it is elsewhere."""

    def __init__(
        self,
        sizes: Sequence[int],
        buffers: DecodeBuffers,
        compute: Callable[[GraphInputs], Outputs],
        device: torch.device,
    ) -> None:
        self.sizes, self.buffers = list(sizes), buffers
        self._compute = compute
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        """The largest first: what it took from the pool serves all others."""
        pool = None
        for size in reversed(self.sizes):
            inputs = self.buffers.inputs(size)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    self._compute(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # NCCL has threads of its own.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = self._compute(inputs)
            pool = pool or graph.pool()
            self._graphs[size] = graph, outputs
        torch.cuda.synchronize()

    def can_run(self, rows: StepRows) -> bool:
        return 0 < len(rows.slots) <= self.sizes[-1] and bool(rows.are_decodes.all())

    def run(self, rows: StepRows, params: npt.NDArray[np.int32]) -> Outputs:
        """Of these sequences, which are all to decode. Waits for nothing.

        To be read before the next run, which writes over it.
        """
        count = len(rows.slots)
        size = self.sizes[bisect_left(self.sizes, count)]
        self.buffers.fill(rows, params, size)
        if size in self._graphs:
            graph, outputs = self._graphs[size]
            graph.replay()
        else:
            outputs = self._compute(self.buffers.inputs(size))
        return Outputs(outputs.token_ids[:count], outputs.logits[:count])
