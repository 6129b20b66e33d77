"""The size of the cache: blocks and states in the memory that is free once the weights are loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.config import Config, LlmConfig
from workers.llm.cache.kv_formats import FORMATS
from workers.llm.cache.spec import CacheSpec, state_bytes, token_bytes

GIB = 1 << 30
CPU_CACHE_GIB = 1.0
CPU_STATES = 32  # beside it and beside those of drafts, of models whose layers keep any
MAX_SNAPSHOTS_A_SLOT = 16  # of a chat of several turns with pictures
ACTIVATIONS_GIB = 1.5  # of the largest step, the graphs, and what the libraries take


class CachePlan(NamedTuple):
    num_blocks: int
    max_model_len: int
    num_slots: int  # sequences at once
    num_snapshots: int = 0  # states of prefixes that are kept
    num_drafts: int = 0  # states behind the drafts of a step


def available_gib(config: Config, device: torch.device, slot_bytes: int, num_drafts: int = 0) -> float:
    """Memory for the cache of one rank; on a GPU the rest of its share, after the ViT and the weights.
    `slot_bytes`: of all states of one sequence. `num_drafts`: as of `plan_cache`.

    Raises ValueError, with the numbers, when none is left.
    """
    if config.llm.kv_cache_gib is not None:
        return config.llm.kv_cache_gib
    if device.type != "cuda":
        return CPU_CACHE_GIB + (CPU_STATES + num_drafts) * slot_bytes / GIB
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
    num_drafts: int = 0,
) -> CachePlan:
    """Blocks and slots that fit `gib` on one rank, at most what `max_num_seqs` full contexts need.

    `num_drafts`: of a step, at most. If layers keep a state, each has one: these are taken off first. Of the
    rest, states have half, or more where blocks do not need the other half: if they need more than that, the
    cache has fewer slots than `max_num_seqs`. Without the option `max_model_len` the context is cut to what
    fits. Raises ValueError, with the numbers, for a `max_model_len` that the model or the cache cannot hold.
    """
    num_seqs, block_size, asked = config.llm.max_num_seqs, config.llm.block_size, config.model.max_model_len
    if asked is not None and asked > max_position_embeddings:
        raise ValueError(
            f"max_model_len {asked} is more than the model's {max_position_embeddings} positions",
        )
    block_bytes = block_size * token_bytes(spec, dtype, FORMATS.get(config.llm.kv_cache_dtype))
    context_bytes = -(-(asked or max_position_embeddings) // block_size) * block_bytes
    slot_bytes, total = state_bytes(spec, dtype), int(gib * GIB)
    num_drafts = num_drafts if slot_bytes else 0
    total -= num_drafts * slot_bytes
    num_slots, num_snapshots = num_seqs, 0
    if slot_bytes:
        sizes = slot_bytes, context_bytes, total
        num_states = _num_states(*sizes, num_seqs, num_drafts, is_asked=asked is not None)
        num_slots, num_snapshots = _divide(num_states, num_seqs, config.llm.prefix_caching)
    # One more than sequences: the padding rows of a batch have a slot, too.
    left = total - (num_slots + 1 + num_snapshots) * slot_bytes if slot_bytes else total
    max_blocks = -(-max_position_embeddings // block_size) * num_slots
    fitting = left // block_bytes if block_bytes else max_blocks
    length = min(max_position_embeddings, fitting * block_size) if asked is None else asked
    context = -(-length // block_size)
    if context > fitting or length < 1:
        needed_gib = max(context, 1) * block_bytes / GIB
        longest = length or max_position_embeddings
        needed = f"a context of {longest} tokens takes {needed_gib:.3f} GiB of KV cache"
        remedy = "raise kv_cache_gib or lower max_model_len"
        raise ValueError(f"{needed}, but there is room for {left / GIB:.3f}: {remedy}")
    return CachePlan(min(fitting, context * num_slots), length, num_slots, num_snapshots, num_drafts)


def _divide(num_states: int, num_seqs: int, has_prefix_cache: bool) -> tuple[int, int]:
    """Slots and snapshots among so many states. Slots have half of them."""
    if not has_prefix_cache:
        return min(num_seqs, num_states), 0
    num_slots = min(num_seqs, -(-num_states // 2))
    return num_slots, min(num_states - num_slots, MAX_SNAPSHOTS_A_SLOT * num_slots)


def _num_states(
    slot_bytes: int, context_bytes: int, total: int, num_seqs: int, num_drafts: int, is_asked: bool
) -> int:
    """States for which there is room, without the spare slot. `context_bytes`: of the KV cache of the longest
    context. `total`: what the states of `num_drafts` drafts have left.

    Raises ValueError, with the numbers, where there is no room for the states of one sequence.
    """
    share = max(total // 2, total - num_seqs * context_bytes)
    if is_asked:  # one such context has to fit
        share = min(share, total - context_bytes)
    fitting = share // slot_bytes - 1  # the spare slot
    if fitting < 1:
        needed = f"the states of one sequence, and of the padding of a batch, take {2 * slot_bytes / GIB:.3f}"
        taken = f"beside {num_drafts * slot_bytes / GIB:.3f} for {num_drafts} drafts " if num_drafts else ""
        room = f"{taken}there is room for {max(0, share) / GIB:.3f}"
        raise ValueError(f"{needed} GiB, but {room}: raise kv_cache_gib")
    return fitting


def describe(plan: CachePlan, spec: CacheSpec, config: LlmConfig, dtype: torch.dtype) -> str:
    """How the memory is divided, in a sentence for the log."""
    kv_format, num_tokens = FORMATS.get(config.kv_cache_dtype), plan.num_blocks * config.block_size
    kv_bytes = num_tokens * token_bytes(spec, dtype, kv_format)
    said = f"the KV cache has {kv_bytes / GIB:.2f} GiB for {num_tokens} tokens"
    if kv_format is not None:
        said += f" in {kv_format.name}"
    if (slot_bytes := state_bytes(spec, dtype)) == 0:
        return said
    states_gib = (plan.num_slots + 1 + plan.num_snapshots + plan.num_drafts) * slot_bytes / GIB
    kept = f"{plan.num_slots} sequences at once and {plan.num_snapshots} prefixes"
    if plan.num_drafts:
        kept = (
            f"{plan.num_slots} sequences at once, {plan.num_snapshots} prefixes and {plan.num_drafts} drafts"
        )
    return f"{said}; states have {states_gib:.2f} GiB for {kept}, {slot_bytes / (1 << 20):.1f} MiB each"
