"""Decode steps as CUDA graphs, in batches of a few sizes: launching a kernel costs more than most of them
take to run.

All that changes from step to step lies in buffers at fixed addresses. Without a GPU the same code runs
uncaptured. The host copies a few numbers a sequence; block tables are on the device already.
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
NUM_STAGINGS = 2  # one buffer is filled while the other may still be copied to the GPU
NUM_WARM_UPS = 2  # so that kernels are compiled, and libraries allocate memory, outside of a graph


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes 1, 2, 4, 8, 10, 12, … `largest`: from 8 on, at most a quarter of a batch is padding."""
    bases = (8 << power for power in range(12))
    steps = itertools.chain((1, 2, 4), (base * quarters // 4 for base in bases for quarters in (4, 5, 6, 7)))
    return [*itertools.takewhile(lambda size: size < largest, steps), largest]


class GraphInputs(NamedTuple):
    """The inputs of a batch of `n`, all on the device.

    Padding rows have the spare slot, and one token at the spare place of the KV cache.
    """

    positions: Tensor  # [n] int32
    slots: Tensor  # [n] int32: of the requests
    lengths: Tensor  # [n] int32, the new token included
    new_slots: Tensor  # [n] int32: where the new token's key and value go
    params: Tensor  # [NUM_PARAMS, n] int32, for the sampling kernel


class Outputs(NamedTuple):
    token_ids: Tensor  # [n] int64
    logits: Tensor  # [n, vocab] float32
    hidden: Tensor  # [n, hidden], in the model's type, where the decoder has a head that reads it


class DeviceTables:
    """The block tables by slot, on the device. New blocks are written in stream order."""

    def __init__(self, sequences: SequenceTable, spare_block: int, device: torch.device) -> None:
        self._sequences, self._device = sequences, device
        shape = sequences.block_tables.shape
        self.tables = torch.zeros(shape, dtype=torch.int32, device=device)  # [num_slots + 1, most blocks]
        self.tables[sequences.spare_slot] = spare_block
        self._num_written = np.zeros(len(sequences.num_blocks), dtype=np.int64)

    def restart(self, slot: int) -> None:
        """Another sequence has the slot: none of its blocks are on the device yet."""
        self._num_written[slot] = 0

    def update(self, slots: npt.NDArray[np.int64]) -> None:
        """Writes the blocks that these slots got since their last update; mostly there are none."""
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
    """Page-locked memory that steps are written to, and its copy on the device."""

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
        """Views of the same memory at each call."""
        rows = self._rows[:, :size]
        positions, slots, lengths, new_slots = rows[: len(FIELDS)]
        return GraphInputs(positions, slots, lengths, new_slots, rows[len(FIELDS) :])

    def fill(self, of_step: StepRows, params: npt.NDArray[np.int32], size: int) -> None:
        """Starts the copy of a step, padded to `size`; `params` [NUM_PARAMS, number of sequences]."""
        self._turn = (self._turn + 1) % NUM_STAGINGS
        rows = self._staged[self._turn].numpy()
        sequences, block_size = self._sequences, self._block_size
        count, starts = len(of_step.slots), of_step.starts
        positions, slots, lengths, new_slots = rows[: len(FIELDS)]
        rows[:, count:size] = 0  # temperature 0 is the cheapest to sample
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
    """Runs `compute` for batches of these sizes: captured on a GPU, uncaptured elsewhere."""

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
        """Captures the largest size first: the other sizes reuse its memory pool."""
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
            # Thread-local, as NCCL's own threads make CUDA calls meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = self._compute(inputs)
            pool = pool or graph.pool()
            self._graphs[size] = graph, outputs
        torch.cuda.synchronize()

    def can_run(self, rows: StepRows) -> bool:
        return 0 < len(rows.slots) <= self.sizes[-1] and bool(rows.are_decodes.all())

    def run(self, rows: StepRows, params: npt.NDArray[np.int32]) -> Outputs:
        """Runs a step of these sequences, all decodes. Does not block.

        The outputs are to be read before the next run, which overwrites them.
        """
        count = len(rows.slots)
        size = self.sizes[bisect_left(self.sizes, count)]
        self.buffers.fill(rows, params, size)
        if size in self._graphs:
            graph, outputs = self._graphs[size]
            graph.replay()
        else:
            outputs = self._compute(self.buffers.inputs(size))
        return Outputs(*(part[:count] for part in outputs))
