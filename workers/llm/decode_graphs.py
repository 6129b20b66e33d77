"""Steps in which every sequence decodes, in batches of a few sizes: as CUDA graphs, since a launch costs more than most of what is launched.

All that changes from step to step lies in buffers that stay where they are. Without a GPU the same code runs uncaptured.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.messages import SequencePlan, unpack_int32
from workers.llm.sampling.choice import NUM_PARAMS

FIELDS = ("token_ids", "is_late", "positions", "slots", "lengths", "new_slots")
NUM_STAGINGS = 2  # one is filled while the other may still be on its way to the GPU
NUM_WARM_UPS = 2  # kernels are compiled, and libraries take their memory, outside of a graph


def graph_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, 16, …, in steps that leave at most a quarter of a batch empty from 8 on; the last is `largest`."""
    steps = itertools.chain((1, 2, 4), (base * quarters // 4 for base in (8 << power for power in range(12)) for quarters in (4, 5, 6, 7)))
    return [*itertools.takewhile(lambda size: size < largest, steps), largest]


class Inputs(NamedTuple):
    """What a batch of `n` reads, all on the device. Rows that fill it up belong to nobody: a spare slot, and one token at a spare place."""

    token_ids: Tensor  # [n] int32
    is_late: Tensor  # [n] int32; not 0: the token is the slot's last one, which the host does not know yet
    positions: Tensor  # [n] int32
    slots: Tensor  # [n] int32: of the requests
    lengths: Tensor  # [n] int32, the new token included
    new_slots: Tensor  # [n] int32: where its key and value go
    params: Tensor  # [NUM_PARAMS, n] int32, for the sampling kernel
    tables: Tensor  # [n, most blocks] int32


class Outputs(NamedTuple):
    token_ids: Tensor  # [n] int64
    logits: Tensor  # [n, vocab] float32


class DecodeBuffers:
    """Page-locked memory that steps are written to, and its image on the device."""

    def __init__(self, largest: int, max_blocks: int, block_size: int, spare_request_slot: int, spare_kv_slot: int, device: torch.device) -> None:
        self._block_size, self._spare_request_slot, self._spare_kv_slot = block_size, spare_request_slot, spare_kv_slot
        is_locked = device.type == "cuda"
        num_rows = len(FIELDS) + NUM_PARAMS
        self._staged = [torch.zeros(num_rows, largest, dtype=torch.int32, pin_memory=is_locked) for _ in range(NUM_STAGINGS)]
        self._staged_tables = [torch.zeros(largest * max_blocks, dtype=torch.int32, pin_memory=is_locked) for _ in range(NUM_STAGINGS)]
        self._turn = 0
        self._rows = torch.zeros(num_rows, largest, dtype=torch.int32, device=device)
        self._packed_tables = torch.zeros(largest * max_blocks, dtype=torch.int32, device=device)
        self._tables = torch.zeros(largest, max_blocks, dtype=torch.int32, device=device)

    def inputs(self, size: int) -> Inputs:
        """The same memory at each call."""
        rows = self._rows[:, :size]
        token_ids, is_late, positions, slots, lengths, new_slots = rows[: len(FIELDS)]
        return Inputs(token_ids, is_late, positions, slots, lengths, new_slots, rows[len(FIELDS) :], self._tables[:size])

    def fill(self, sequences: Sequence[SequencePlan], params: npt.NDArray[np.int32], size: int) -> None:
        """Starts the copy of a step, filled up to `size`; `params` [NUM_PARAMS, len(sequences)]."""
        self._turn = (self._turn + 1) % NUM_STAGINGS
        rows = self._staged[self._turn].numpy()
        count = len(sequences)
        token_ids, is_late, positions, slots, lengths, new_slots = rows[: len(FIELDS)]
        rows[:, count:size] = 0  # temperature 0 is the cheapest way to choose
        slots[count:size], lengths[count:size], new_slots[count:size] = self._spare_request_slot, 1, self._spare_kv_slot
        rows[len(FIELDS) :, :count] = params
        width = max(1 + sequence.num_computed_tokens // self._block_size for sequence in sequences)
        tables = self._staged_tables[self._turn].numpy()[: size * width].reshape(size, width)
        tables[count:] = self._spare_kv_slot // self._block_size
        for row, sequence in enumerate(sequences):
            is_late[row] = not sequence.token_ids
            token_ids[row] = unpack_int32(sequence.token_ids)[0] if sequence.token_ids else 0
            positions[row] = unpack_int32(sequence.positions)[0]  # of text all three are equal
            slots[row], lengths[row] = sequence.slot, sequence.num_computed_tokens + 1
            num_blocks = 1 + sequence.num_computed_tokens // self._block_size
            tables[row, :num_blocks] = unpack_int32(sequence.block_table)[:num_blocks]
            tables[row, num_blocks:] = 0
            new_slots[row] = tables[row, num_blocks - 1] * self._block_size + sequence.num_computed_tokens % self._block_size
        self._rows.copy_(self._staged[self._turn], non_blocking=True)
        packed = self._packed_tables[: size * width]
        packed.copy_(self._staged_tables[self._turn][: size * width], non_blocking=True)
        self._tables[:size, :width] = packed.view(size, width)


def is_decode(sequence: SequencePlan) -> bool:
    """One token of text, whose result is wanted."""
    return sequence.is_sampled and len(sequence.token_ids) <= 4 and not sequence.embeddings and len(set(unpack_int32(sequence.positions))) == 1


class DecodeGraphs:
    """Runs `compute` for batches of these sizes: captured where the device is a GPU, as it is elsewhere."""

    def __init__(self, sizes: Sequence[int], buffers: DecodeBuffers, compute: Callable[[Inputs], Outputs], device: torch.device) -> None:
        self.sizes, self.buffers = list(sizes), buffers
        self._compute = compute
        self._graphs: dict[int, tuple[Any, Outputs]] = {}
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
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL has threads of its own
                outputs = self._compute(inputs)
            pool = pool or graph.pool()
            self._graphs[size] = graph, outputs
        torch.cuda.synchronize()

    def run(self, sequences: Sequence[SequencePlan], params: npt.NDArray[np.int32]) -> Outputs:
        """Of these sequences, which are all to decode; to be read before the next run, which writes over it. Waits for nothing."""
        count = len(sequences)
        size = self.sizes[bisect_left(self.sizes, count)]
        self.buffers.fill(sequences, params, size)
        if size in self._graphs:
            graph, outputs = self._graphs[size]
            graph.replay()
        else:
            outputs = self._compute(self.buffers.inputs(size))
        return Outputs(outputs.token_ids[:count], outputs.logits[:count])
