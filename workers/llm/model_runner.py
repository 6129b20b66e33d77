"""Computes a step plan on one rank: embeds, gathers the pictures' embeddings in place, runs the decoder, returns logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.families import ModelInfo
from pipeline.messages import SequencePlan, unpack_int32
from pipeline.tensors import PoolMap
from workers.llm.attention.torch import PagedAttention, Span
from workers.llm.models.qwen2_vl import Decoder
from workers.llm.parallel import HeadLayout, TensorParallel
from workers.nn.loader import Checkpoint, Progress, choose_dtype

GIB = 1 << 30


class ModelRunner:
    def __init__(
        self, info: ModelInfo, config: Config, folder: Path, device: torch.device, parallel: TensorParallel, num_blocks: int, progress: Progress
    ) -> None:
        self.device = device
        self.pools = PoolMap()
        dtype = choose_dtype(config.model.dtype, device)
        checkpoint = Checkpoint(folder, dtype, device, progress)
        checkpoint.expect("model.")
        self.decoder = Decoder(info.text, checkpoint, parallel)
        heads = self.decoder.heads
        self.attention = PagedAttention(info.text.num_layers, num_blocks, config.llm.block_size, heads.num_kv_heads, heads.head_dim, dtype, device)

    @torch.inference_mode()
    def execute(self, sequences: Sequence[SequencePlan]) -> Tensor:
        """Logits [num_sampled, vocab] float32 of the sequences that want them, in their order.

        Raises StaleHandleError when an embedding of the plan is no longer there.
        """
        token_ids = self._tensor(np.concatenate([unpack_int32(sequence.token_ids) for sequence in sequences]))
        positions = self._tensor(np.concatenate([unpack_int32(sequence.positions).reshape(3, -1) for sequence in sequences], axis=1))
        lengths = [len(sequence.token_ids) // 4 for sequence in sequences]
        x = self.decoder.embed_tokens[token_ids]  # [num_tokens, hidden]
        start = 0
        for sequence, length in zip(sequences, lengths, strict=True):
            for part in sequence.embeddings:
                rows = self.pools.tensor(part.embeddings)[part.start : part.start + part.length]
                x[start + part.offset : start + part.offset + part.length] = rows
            start += length
        spans = [
            Span(length, sequence.num_computed_tokens, self._tensor(unpack_int32(sequence.block_table)))
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        hidden = self.decoder(x, positions, self.attention, self.attention.plan(spans))
        ends = np.cumsum(lengths) - 1
        wanted = [int(end) for end, sequence in zip(ends, sequences, strict=True) if sequence.wants_logits]
        # Ranks must agree on whether there is a collective at all: the plan says so, and it is the same for all.
        if wanted:
            return self.decoder.logits(hidden[wanted])
        if self.device.type == "cuda" and any(sequence.embeddings for sequence in sequences):
            # Nothing of this step is read on the host, but its leases are released now: the gather must have happened.
            torch.cuda.current_stream(self.device).synchronize()
        return hidden.new_zeros(0, 0)

    def _tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


class KvPlan(NamedTuple):
    num_blocks: int
    max_model_len: int


def plan_kv_cache(info: ModelInfo, config: Config, tp_size: int, dtype: torch.dtype) -> KvPlan:
    """Blocks that fit `--kv-cache-gib` on one rank, never more than `max_num_seqs` full contexts need.

    Where no `max_model_len` is asked for, the context is cut to what fits. Raises ValueError, with the numbers, when one is
    asked for that the model or the cache cannot hold.
    """
    heads = HeadLayout(info.text, 0, tp_size)
    block_bytes = info.text.num_layers * 2 * heads.num_kv_heads * heads.head_dim * dtype.itemsize * config.llm.block_size
    fitting = int(config.llm.kv_cache_gib * GIB / block_bytes)
    limit, asked = info.text.max_position_embeddings, config.model.max_model_len
    if asked is not None and asked > limit:
        raise ValueError(f"max_model_len {asked} is more than the model's {limit} positions")
    length = min(limit, fitting * config.llm.block_size) if asked is None else asked
    context = -(-length // config.llm.block_size)
    if context > fitting or length < 1:
        raise ValueError(
            f"a context of {length or limit} tokens takes {max(context, 1) * block_bytes / GIB:.3f} GiB of KV cache, but kv_cache_gib is "
            f"{config.llm.kv_cache_gib}: raise it or lower max_model_len"
        )
    return KvPlan(min(fitting, context * config.llm.max_num_seqs), length)
