"""Computes a step plan on one rank: embeds, gathers the pictures' embeddings in place, runs the decoder, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.families import ModelInfo
from pipeline.messages import SequencePlan, StepPlan, TokenLogprobs, pack_int32, unpack_int32
from pipeline.tensors import PoolMap
from workers.llm.attention.torch import PagedAttention, Span
from workers.llm.models.qwen2_vl import Decoder
from workers.llm.parallel import HeadLayout, TensorParallel
from workers.llm.sampler import Sampled, Sampler
from workers.nn.layers import make_int8_linear, make_linear
from workers.nn.loader import Checkpoint, Progress, choose_dtype, to_device

GIB = 1 << 30
CPU_KV_CACHE_GIB = 1.0
ACTIVATIONS_GIB = 1.5  # of the largest step, and what the libraries take
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


class ModelRunner:
    """Loads the weights; `open_cache` follows, once it is known what memory is left."""

    attention: PagedAttention

    def __init__(self, info: ModelInfo, config: Config, folder: Path, device: torch.device, parallel: TensorParallel, progress: Progress) -> None:
        self.device, self._info, self._config = device, info, config
        self.pools = PoolMap()
        dtype = choose_dtype(config.model.dtype, device)
        checkpoint = Checkpoint(folder, dtype, device, progress)
        checkpoint.expect("model.")
        self.decoder = Decoder(info.text, checkpoint, parallel, make_int8_linear if config.llm.quantization == "int8" else make_linear)
        checkpoint.close()
        self._dtype = dtype
        self.sampler = Sampler(config.llm.max_num_seqs, info.text.vocab_size, info.eos_token_ids, device)
        self._last_tokens = torch.zeros(config.llm.max_num_seqs, dtype=torch.int64, device=device)  # by slot

    def open_cache(self, num_blocks: int) -> None:
        heads, size = self.decoder.heads, self._config.llm.block_size
        self.attention = PagedAttention(
            self._info.text.num_layers, num_blocks, size, heads.num_kv_heads, heads.head_dim, self._dtype, self.device
        )  # fmt: skip

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step; on the CPU it has run when this returns.

        Raises StaleHandleError when an embedding of the plan is no longer there.
        """
        for start in plan.started:
            self.sampler.start(start)
        sequences = plan.sequences
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
                x[first : first + part.length] = self.pools.tensor(part.embeddings)[part.start : part.start + part.length]
        spans = [
            Span(length, sequence.num_computed_tokens, unpack_int32(sequence.block_table).tolist())
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        return self.decoder(x, positions, self.attention, self.attention.plan(spans)), ends

    def _tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return to_device(values.astype(np.int64), self.device)


class KvPlan(NamedTuple):
    num_blocks: int
    max_model_len: int


def kv_cache_gib(config: Config, device: torch.device) -> float:
    """Memory for the KV cache of one rank. On a GPU what is left of its share now, after the ViT and the weights.

    Raises ValueError, with the numbers, when nothing is.
    """
    if config.llm.kv_cache_gib is not None:
        return config.llm.kv_cache_gib
    if device.type != "cuda":
        return CPU_KV_CACHE_GIB
    free, total = (value / GIB for value in torch.cuda.mem_get_info(device))
    left = config.llm.gpu_memory_utilization * total - (total - free) - ACTIVATIONS_GIB
    if left <= 0:
        raise ValueError(
            f"gpu_memory_utilization {config.llm.gpu_memory_utilization} of {total:.1f} GiB leaves no room for a KV cache: "
            f"{total - free:.1f} GiB are used, and {ACTIVATIONS_GIB} GiB are kept for activations"
        )
    return left


def plan_kv_cache(info: ModelInfo, config: Config, tp_size: int, dtype: torch.dtype, available_gib: float) -> KvPlan:
    """Blocks that fit `available_gib` on one rank, never more than `max_num_seqs` full contexts need.

    Where no `max_model_len` is asked for, the context is cut to what fits. Raises ValueError, with the numbers, when one is
    asked for that the model or the cache cannot hold.
    """
    heads = HeadLayout(info.text, 0, tp_size)
    block_bytes = info.text.num_layers * 2 * heads.num_kv_heads * heads.head_dim * dtype.itemsize * config.llm.block_size
    fitting = int(available_gib * GIB / block_bytes)
    limit, asked = info.text.max_position_embeddings, config.model.max_model_len
    if asked is not None and asked > limit:
        raise ValueError(f"max_model_len {asked} is more than the model's {limit} positions")
    length = min(limit, fitting * config.llm.block_size) if asked is None else asked
    context = -(-length // config.llm.block_size)
    if context > fitting or length < 1:
        raise ValueError(
            f"a context of {length or limit} tokens takes {max(context, 1) * block_bytes / GIB:.3f} GiB of KV cache, but there is room for "
            f"{available_gib:.3f}: raise kv_cache_gib or lower max_model_len"
        )
    return KvPlan(min(fitting, context * config.llm.max_num_seqs), length)
