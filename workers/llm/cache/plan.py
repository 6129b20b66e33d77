"""The size of the cache: blocks and states in the memory that is free once the weights are loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.config import Config
from workers.llm.cache.spec import CacheSpec, paged_of, states_of

GIB = 1 << 30
CPU_CACHE_GIB = 1.0
ACTIVATIONS_GIB = 1.5  # of the largest step, the graphs, and what the libraries take


class CachePlan(NamedTuple):
    num_blocks: int
    max_model_len: int


def available_gib(config: Config, device: torch.device) -> float:
    """Memory for the cache of one rank; on a GPU the rest of its share, after the ViT and the weights.

    Raises ValueError, with the numbers, when none is left.
    """
    if config.llm.kv_cache_gib is not None:
        return config.llm.kv_cache_gib
    if device.type != "cuda":
        return CPU_CACHE_GIB
    free, total = (value / GIB for value in torch.cuda.mem_get_info(device))
    left = config.llm.gpu_memory_utilization * total - (total - free) - ACTIVATIONS_GIB
    if left <= 0:
        share = config.llm.gpu_memory_utilization
        raise ValueError(
            f"gpu_memory_utilization {share} of {total:.1f} GiB leaves no room for a KV cache: "
            f"{total - free:.1f} GiB are used, and {ACTIVATIONS_GIB} GiB are kept for activations"
        )
    return left


def plan_cache(
    spec: CacheSpec,
    max_position_embeddings: int,
    config: Config,
    dtype: torch.dtype,
    gib: float,
) -> CachePlan:
    """Blocks that fit `gib` on one rank beside the states, at most what `max_num_seqs` full contexts need.

    Without the option `max_model_len` the context is cut to what fits. Raises ValueError, with the numbers,
    for a `max_model_len` that the model or the cache cannot hold.
    """
    num_seqs, block_size, asked = config.llm.max_num_seqs, config.llm.block_size, config.model.max_model_len
    if asked is not None and asked > max_position_embeddings:
        raise ValueError(
            f"max_model_len {asked} is more than the model's {max_position_embeddings} positions",
        )
    # One more than sequences: the padding rows of a batch have a slot, too.
    states_gib = (num_seqs + 1) * sum(state.nbytes for state in states_of(spec)) / GIB
    if states_gib >= gib:
        needed = f"the states of {num_seqs} sequences take {states_gib:.3f} GiB"
        remedy = "raise kv_cache_gib or lower max_num_seqs"
        raise ValueError(f"{needed}, but there is room for {gib:.3f}: {remedy}")
    block_bytes = block_size * sum(paged.bytes_per_token(dtype) for paged in paged_of(spec))
    max_blocks = -(-max_position_embeddings // block_size) * num_seqs
    fitting = int((gib - states_gib) * GIB / block_bytes) if block_bytes else max_blocks
    length = min(max_position_embeddings, fitting * block_size) if asked is None else asked
    context = -(-length // block_size)
    if context > fitting or length < 1:
        needed_gib = max(context, 1) * block_bytes / GIB
        longest = length or max_position_embeddings
        needed = f"a context of {longest} tokens takes {needed_gib:.3f} GiB of KV cache"
        remedy = "raise kv_cache_gib or lower max_model_len"
        raise ValueError(f"{needed}, but there is room for {gib - states_gib:.3f}: {remedy}")
    return CachePlan(min(fitting, context * num_seqs), length)
