"""Computes a step plan on one rank: embeds, gathers the pictures' embeddings in place, runs the decoder, samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.families import ModelInfo
from pipeline.messages import SequencePlan, StepPlan, TokenLogprobs, pack_int32, unpack_int32
from pipeline.tensors import PoolGoneError, PoolInfo, PoolMap, TensorHandle
from workers.llm.attention.torch import Span
from workers.llm.backends import choose_backend
from workers.llm.decode_graphs import DecodeBuffers, DecodeGraphs, Inputs, Outputs, graph_sizes, is_decode
from workers.llm.models.qwen2_vl import Decoder
from workers.llm.parallel import TensorParallel
from workers.llm.sampler import Sampled, Sampler
from workers.nn.layers import make_int8_linear, make_linear
from workers.nn.loader import Checkpoint, Progress, choose_dtype, to_device

logger = logging.getLogger(__name__)
LARGEST_GRAPH = 512  # requests; with more a launch costs little beside the step
Int64Array = npt.NDArray[np.int64]


class StepResult(NamedTuple):
    """What the sampled sequences of a step yielded, in the plan's order."""

    token_ids: list[int]
    logprobs: Sequence[tuple[TokenLogprobs, ...]]  # one each where they are wanted, else none


class Launched:
    """A step under way. On CUDA its results are on their way to the host while the next step is prepared."""

    def __init__(self, sampled: Sampled | None, num_logprobs: Sequence[int], device: torch.device) -> None:
        self.has_run = device.type == "cpu"
        self._num_logprobs = num_logprobs
        self._parts = [_to_host(part) for part in sampled or () if part is not None]
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def result(self) -> StepResult:
        """Waits for the step: every embedding that it reads has been gathered then."""
        if self._event is not None:
            self._event.synchronize()
        if not self._parts:
            return StepResult([], [])
        token_ids, *best = (part.numpy() for part in self._parts)
        if not best:
            return StepResult(token_ids.tolist(), [()] * len(token_ids))
        logprobs = [
            (TokenLogprobs(pack_int32(ids[: count + 1]), values[: count + 1].astype("<f4").tobytes()),) if count >= 0 else ()
            for values, ids, count in zip(*best, self._num_logprobs, strict=True)
        ]
        return StepResult(token_ids.tolist(), logprobs)


def _to_host(part: Tensor) -> Tensor:
    if part.device.type == "cpu":
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)


class EmbeddingPools:
    """The ViTs' pools as the ranks of a group see them together: each reads in place, or one that can hands the rows on."""

    def __init__(self, pools: PoolMap, parallel: TensorParallel) -> None:
        self._pools, self._parallel = pools, parallel
        self._opened: dict[str, tuple[int, int | None]] = {}  # the epoch, and the rank that reads for all; None: each for itself

    def open(self, info: PoolInfo) -> None:
        """To be called on all ranks, in the same order among steps. Raises PipelineError when no rank can map the pool."""
        error, is_gone = "", False
        try:
            self._pools.open(info)
        except PoolGoneError as caught:
            error, is_gone = str(caught), True
        except (PipelineError, OSError, ImportError) as caught:  # the others wait to hear of it
            error = str(caught)
        can_read = self._parallel.gather_flags(not error)
        if is_gone:
            logger.info("%s", error)  # of a successor we shall hear
            return
        if not any(can_read):
            raise PipelineError(f"the embeddings of {info.pool_id} cannot be read ({error}); --embedding-transport host needs no mapping")
        self._opened[info.pool_id] = info.epoch, None if all(can_read) else can_read.index(True)
        if error:
            logger.warning("rank %d gets the embeddings of %s from rank %d: %s", self._parallel.rank, info.pool_id, can_read.index(True), error)

    def close(self, pool_id: str) -> None:
        """Its owner has died; no step reads it any more."""
        self._opened.pop(pool_id, None)
        self._pools.close(pool_id)

    def knows(self, pool_id: str, epoch: int) -> bool:
        return self._opened.get(pool_id, (-1, None))[0] >= epoch

    def gather(self, out: Tensor, embeddings: TensorHandle, start: int) -> None:
        """Fills contiguous rows of a step's input, in the order of its stream. Raises StaleHandleError when they are no longer there."""
        _, reader = self._opened.get(embeddings.pool_id, (-1, None))
        if reader is None or reader == self._parallel.rank:
            self._pools.copy_rows(out, embeddings, start)
        if reader is not None:
            self._parallel.broadcast(out, reader)


class ModelRunner:
    """Loads the weights; `open_cache` follows, once it is known what memory is left."""

    attention: Any

    def __init__(self, info: ModelInfo, config: Config, folder: Path, device: torch.device, parallel: TensorParallel, progress: Progress) -> None:
        self.device, self._info, self._config = device, info, config
        self.pools = EmbeddingPools(PoolMap(device.index if device.type == "cuda" else None), parallel)
        dtype = choose_dtype(config.model.dtype, device)
        checkpoint = Checkpoint(folder, dtype, device, progress)
        checkpoint.expect("model.")
        self._backend = choose_backend(config.llm.attention, device)
        linear = make_int8_linear if config.llm.quantization == "int8" else make_linear
        self.decoder = Decoder(info.text, checkpoint, parallel, linear, self._backend.kernels)
        checkpoint.close()
        self._dtype = dtype
        if config.llm.all_reduce == "symmetric":
            parallel.use_symmetric_memory(LARGEST_GRAPH * info.text.hidden_size, dtype)
        self._num_slots = config.llm.max_num_seqs
        self.sampler = Sampler(self._num_slots, info.text.vocab_size, info.eos_token_ids, device, self._backend.sample)
        # By slot; the last is that of the rows that fill up a batch.
        self._last_tokens = torch.zeros(self._num_slots + 1, dtype=torch.int64, device=device)
        self._graphs: DecodeGraphs | None = None

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        """Makes the KV cache, and captures the graphs of decode steps where the backend can be captured."""
        heads, size = self.decoder.heads, self._config.llm.block_size
        self.attention = self._backend.attention(
            self._info.text.num_layers, num_blocks, size, heads.num_kv_heads, heads.head_dim, self._dtype, self.device
        )  # fmt: skip
        if self._backend.sample is None:
            return
        with torch.inference_mode():
            self.attention.warm_up(heads.num_heads)
        if not self._config.llm.cuda_graphs:
            return
        sizes = graph_sizes(min(self._num_slots, LARGEST_GRAPH))
        # One for all sizes: as outputs of the graphs they would take as much as all sizes together.
        self._logits = torch.empty(sizes[-1], self._info.text.vocab_size, dtype=torch.float32, device=self.device)
        buffers = DecodeBuffers(sizes[-1], -(-max_model_len // size), size, self._num_slots, self.attention.spare_slot, self.device)
        with torch.inference_mode():
            self._graphs = DecodeGraphs(sizes, buffers, lambda inputs: self._decode(inputs, max_model_len), self.device)

    def _decode(self, inputs: Inputs, longest: int) -> Outputs:
        """One token more for each sequence. Everything stays on the device, and where it is: a CUDA graph can hold it."""
        assert self._backend.sample is not None
        slots = inputs.slots.long()
        token_ids = torch.where(inputs.is_late != 0, self._last_tokens[slots], inputs.token_ids)
        layout = self.attention.plan_decode(inputs.new_slots, inputs.tables, inputs.lengths, longest)
        hidden = self.decoder(self.decoder.embed(token_ids), inputs.positions.expand(3, -1), self.attention, layout)
        logits = self.decoder.logits(hidden, self._logits[: len(hidden)])
        chosen = self._backend.sample(logits, inputs.params)
        self._last_tokens[slots] = chosen
        return Outputs(chosen, logits)

    def close(self) -> None:
        """Lets go of the graphs: NCCL does not end while one holds its communicator."""
        self._graphs = None

    @torch.inference_mode()
    def finish(self) -> None:
        """Waits until no step is under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step; on the CPU it has run when this returns.

        Raises StaleHandleError when an embedding of the plan is no longer there.
        """
        for start in plan.started:
            self.sampler.start(start)
        sequences = plan.sequences
        if self._graphs is not None and 0 < len(sequences) <= self._graphs.sizes[-1] and all(is_decode(sequence) for sequence in sequences):
            return self._launch_decode(self._graphs, sequences)
        sampled_slots = np.array([sequence.slot for sequence in sequences if sequence.is_sampled], dtype=np.int64)
        hidden, ends = self._compute(sequences)
        # Ranks must agree on whether there is a collective at all: the plan says so, and it is the same for all.
        if not len(sampled_slots):
            return Launched(None, (), self.device)
        wanted = [index for index, sequence in enumerate(sequences) if sequence.is_sampled]
        num_tokens = np.array([sequences[index].num_computed_tokens for index in wanted]) + np.diff(ends, prepend=0)[wanted]
        logits = self.decoder.logits(hidden[self._tensor(ends[wanted] - 1)])
        sampled = self.sampler.sample(logits, sampled_slots, num_tokens)
        self._last_tokens[self._tensor(sampled_slots)] = sampled.token_ids
        return Launched(sampled, self.sampler.num_logprobs(sampled_slots), self.device)

    def _launch_decode(self, graphs: DecodeGraphs, sequences: Sequence[SequencePlan]) -> Launched:
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        num_tokens = np.array([sequence.num_computed_tokens + 1 for sequence in sequences], dtype=np.int64)
        outputs = graphs.run(sequences, self.sampler.draw_params(slots, num_tokens))
        if self.sampler.is_plain(slots):
            sampled = Sampled(outputs.token_ids, None, None)
        else:  # the graph's choice does not count
            sampled = self.sampler.sample(outputs.logits, slots, num_tokens)
            self._last_tokens[self._tensor(slots)] = sampled.token_ids
        return Launched(sampled, self.sampler.num_logprobs(slots), self.device)

    def _compute(self, sequences: Sequence[SequencePlan]) -> tuple[Tensor, Int64Array]:
        """Hidden states [num_tokens, hidden] of all sequences side by side, and where each ends."""
        lengths = [max(1, len(sequence.token_ids) // 4) for sequence in sequences]
        ends = np.cumsum(lengths)
        host = [unpack_int32(sequence.token_ids or bytes(4)) for sequence in sequences]
        token_ids = self._tensor(np.concatenate(host))
        if late := [index for index, sequence in enumerate(sequences) if not sequence.token_ids]:
            slots = np.array([sequences[index].slot for index in late])
            token_ids[self._tensor(ends[late] - 1)] = self._last_tokens[self._tensor(slots)]
        positions = self._tensor(np.concatenate([unpack_int32(sequence.positions).reshape(3, -1) for sequence in sequences], axis=1))
        x = self.decoder.embed(token_ids)  # [num_tokens, hidden]
        for sequence, length, end in zip(sequences, lengths, ends.tolist(), strict=True):
            for part in sequence.embeddings:
                first = end - length + part.offset
                self.pools.gather(x[first : first + part.length], part.embeddings, part.start)
        spans = [
            Span(length, sequence.num_computed_tokens, unpack_int32(sequence.block_table).tolist())
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        return self.decoder(x, positions, self.attention, self.attention.plan(spans)), ends

    def _tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return to_device(values.astype(np.int64), self.device)
