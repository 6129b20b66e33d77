"""A rank before it is READY: it waits for ViTs and other ranks, builds its scheduler, measures its steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipeline.client.detokenizer import tokenizer_hash
from pipeline.config import MIB, LlmConfig
from pipeline.families import ModelInfo
from pipeline.process.core_sharing import CoreSharing
from pipeline.process.phases import WAITING
from pipeline.process.process import WorkerContext
from pipeline.transport.ends import Publisher, Receiver
from pipeline.transport.poller import Poller
from pipeline.wire.clients import PROTOCOL_VERSION, Welcome
from pipeline.wire.control import ControlMessage
from pipeline.wire.steps import StepsMessage
from pipeline.wire.topology import Role
from workers.llm.cache.kv_formats import FORMATS
from workers.llm.cache.manager import CacheManager
from workers.llm.cache.plan import CachePlan, describe
from workers.llm.cache.spec import CacheSpec, states_of
from workers.llm.calibration import measure_step_times
from workers.llm.engine import Engine
from workers.llm.models.base import Decoder
from workers.llm.scheduler import Scheduler
from workers.llm.speculation.drafter import MAX_ROWS, Drafter
from workers.llm.speculation.ngram import NgramProposer
from workers.llm.speculation.proposer import Proposer
from workers.llm.speculation.told import ToldProposer
from workers.llm.step_times import StepTimes

TURN_START = "<|im_start|>"
logger = logging.getLogger(__name__)
# By the option `--speculative`.
PROPOSERS: Mapping[str, Callable[[], Proposer]] = {"ngram": NgramProposer, "mtp": ToldProposer}


def wait_for_vits(context: WorkerContext, control: Receiver[ControlMessage]) -> None:
    """A ViT on the same GPU takes its memory first; the KV cache gets the rest.

    A ViT may build its engine for minutes. Meanwhile this rank reports progress, so that the launcher's start
    timeout ends the ViT that hangs, not the rank that waits for it.
    """
    poller = Poller(control)
    while True:
        poller.wait()
        if (states := context.read_control(control).states) is not None:
            vits = [
                state
                for state in states
                if state.worker.role is Role.VIT and context.nodes.is_here(state.worker)
            ]
            missing = [str(state.worker) for state in vits if not state.is_ready]
            if not missing:
                return
            context.progress(WAITING + ", ".join(missing), len(vits) - len(missing), len(vits))


def wait_for_ranks(
    context: WorkerContext, control: Receiver[ControlMessage], steps: Publisher[StepsMessage]
) -> None:
    """Until every other rank of the group has subscribed: a step published earlier would be lost."""
    num_ranks = 1
    poller = Poller(steps, control)
    while num_ranks < context.config.llm.tp:
        poller.wait()
        context.read_control(control)
        num_ranks += sum(1 if event.is_new else -1 for event in steps.subscriptions())


def make_scheduler(
    context: WorkerContext, info: ModelInfo, cache_plan: CachePlan, decoder: Decoder
) -> Scheduler:
    """Tells in the log how the memory of the cache is divided."""
    config, spec = context.config.llm, decoder.cache_spec()
    logger.info("%s", describe(cache_plan, spec, config, decoder.dtype))
    if (kv_format := FORMATS.get(config.kv_cache_dtype)) is not None:
        logger.info("keys and values in %s cost the embedded model %s", kv_format.name, kv_format.loss)
    cache = CacheManager.of_size(
        cache_plan.num_blocks, config.block_size, cache_plan.num_slots, has_states=bool(states_of(spec)),
        num_snapshots=cache_plan.num_snapshots,
    )  # fmt: skip
    if config.prefix_caching and not cache.has_prefixes:
        logger.warning("prefix caching is off: the memory holds no states of prefixes: raise kv_cache_gib")
    return Scheduler(
        cache,
        config.max_num_batched_tokens,
        info.eos_token_ids,
        has_prefix_cache=config.prefix_caching,
        runs_alone=context.quarantine.runs_alone,
        drafter=make_drafter(config),
        prefill_multiple=decoder.prefill_multiple,
        turn_start_id=turn_start_id(context.model_folder) if cache.snapshots is not None else None,
    )


def turn_start_id(folder: Path) -> int | None:
    """The token that begins a turn in the chat templates of all Qwen models; None: the tokenizer has none."""
    added = json.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens", ())
    return next((entry["id"] for entry in added if entry["content"] == TURN_START), None)


def make_welcome(context: WorkerContext, max_model_len: int) -> Welcome:
    config, folder = context.config, context.model_folder
    return Welcome(
        protocol=PROTOCOL_VERSION, model_folder=str(folder), model_name=config.model.model_name,
        adapters=config.model.adapter_names,
        max_model_len=max_model_len, max_requests=config.max_requests_per_client,
        max_request_bytes=config.api.max_request_mib * MIB, max_attempts=config.launcher.max_attempts,
        recovery_timeout=config.launcher.recovery_timeout,
        tokenizer_hash=tokenizer_hash((folder / "tokenizer.json").read_bytes()), **context.origin,
    )  # fmt: skip


def has_overlap(config: LlmConfig, device: torch.device) -> bool:
    """Whether steps overlap. On the CPU the same cores plan and compute: overlap would only delay tokens. A
    guess needs the tokens of the step before."""
    is_useful = device.type == "cuda" and config.speculative == "none"
    return config.overlap == "on" or (config.overlap == "auto" and is_useful)


def most_drafts(config: LlmConfig) -> int:
    """In one step, over all its sequences."""
    if config.speculative == "none":
        return 0
    return min(MAX_ROWS - 1, config.max_num_seqs * config.max_guesses)


def check_options(config: LlmConfig, spec: CacheSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for what this model, or its device, has no use for."""
    check_linear_attention(config, spec)
    check_kv_cache(config, device, dtype)


def check_linear_attention(config: LlmConfig, spec: CacheSpec) -> None:
    """Raises ValueError where a way is asked for and there is nothing to compute."""
    if config.linear_attention != "auto" and not states_of(spec):
        raise ValueError(
            f"linear_attention {config.linear_attention!r} is for models with layers of linear attention, "
            "and this model has none"
        )


def check_kv_cache(config: LlmConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where no kernel is for such keys and values."""
    is_for_kernels = device.type == "cuda" and config.attention != "torch"
    if config.kv_cache_dtype != "auto" and is_for_kernels and dtype == torch.float32:
        raise ValueError(
            f"kv_cache_dtype {config.kv_cache_dtype!r} on a GPU is for models in 16 bits, and this one "
            "computes in float32: choose dtype bfloat16, or attention 'torch'"
        )


def make_drafter(config: LlmConfig) -> Drafter | None:
    make_proposer = PROPOSERS.get(config.speculative)
    if make_proposer is None:
        return None
    return Drafter(make_proposer, config.max_guesses, asks_runner=config.speculative == "mtp")


def measure_steps(
    context: WorkerContext, engine: Engine, max_model_len: int, sharing: CoreSharing
) -> dict[bool, StepTimes]:
    """Step times by `is_wide`: on this worker's own cores and, where it may widen, on all cores."""
    config, scheduler = context.config, engine.scheduler
    step_times: dict[bool, StepTimes] = {}
    for is_wide in (False, True)[: 1 + bool(sharing.can_widen)] if config.llm.max_itl_stretch else ():
        context.progress("measuring steps", len(step_times), 2)
        sharing.widen(is_wide)
        engine.stepper.is_wide = is_wide
        step_times[is_wide] = measure_step_times(
            engine.execute,
            scheduler.cache,
            scheduler.budget.max_num_batched_tokens,
            max_model_len,
            config.llm.max_itl_stretch,
        )
    return step_times
