"""The process of an LLM rank.

Rank 0 of a group: drain → step → drain → …; the other ranks compute the plans that rank 0 publishes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pipeline.families import ModelInfo
from pipeline.process.compute_threads import spread_threads
from pipeline.process.core_sharing import Activity, CoreSharing
from pipeline.process.phases import LOADING
from pipeline.process.process import (
    DRAIN_STATS_INTERVAL_S,
    WorkerContext,
)
from pipeline.transport.ends import Publisher, Receiver
from pipeline.transport.poller import Poller, Wakeup
from pipeline.wire.clients import CLIENT_ID_BYTES, OutputsMessage
from pipeline.wire.control import ControlMessage
from pipeline.wire.generation import LlmMessage
from pipeline.wire.steps import StepsMessage
from pipeline.wire.topology import ENCODE, FEEDBACK, LLM, OUTPUTS, STEPS, Role, WorkerId, parse_worker
from workers.grammars.vocabulary import GrammarVocabulary
from workers.llm.cache.plan import GIB, available_gib, plan_cache
from workers.llm.cache.spec import state_bytes, states_of
from workers.llm.engine import Engine, Links
from workers.llm.follower import Follower
from workers.llm.lending import Lending
from workers.llm.matcher_starts import MatcherStarts
from workers.llm.meeting import Meeting, wait_for_meeting
from workers.llm.metrics import declare
from workers.llm.model_runner import ModelRunner
from workers.llm.models.registry import decoder_of
from workers.llm.parallel import TensorParallel
from workers.llm.sampling.grammar import GrammarRule
from workers.llm.scheduler import Scheduler
from workers.llm.start import (
    check_options,
    has_overlap,
    make_scheduler,
    make_welcome,
    measure_steps,
    most_drafts,
    wait_for_ranks,
    wait_for_vits,
)
from workers.llm.step_times import StepTimes
from workers.llm.stepping import Watch
from workers.model_info import model_info_of
from workers.nn.fused import linear_attention_of
from workers.nn.loader import choose_device, choose_dtype
from workers.nn.weights.registry import choose_formats

logger = logging.getLogger(__name__)
STATS_INTERVAL_S = 1.0
OUTPUTS_HIGH_WATER_MARK = 2048  # messages (one a step) by which a client may lag before it is cut off
MAX_MESSAGES_PER_STEP = 512  # read between two steps: a flood of messages must not stop the streams


def main(context: WorkerContext) -> None:
    config, tp_size = context.config, context.config.llm.tp
    rank, lead = context.worker.rank % tp_size, context.worker.rank // tp_size * tp_size
    torch.set_num_threads(context.spec.placement.num_threads)
    control, info = context.control(), model_info_of(context)
    device = choose_device(config.model.device, context.spec.placement.device)
    dtype = choose_dtype(config.model.dtype, device)
    # What is not served fails before any waiting.
    activations = config.llm.activation_quantization
    choose_formats(context.model_folder, device, config.llm.quantization, activations=activations)
    decoder_of(info).check_experts(info.text, tp_size, config.llm.expert_parallel)
    spec = decoder_of(info).spec_of(info.text, tp_size)
    check_options(config.llm, spec, device, dtype)
    if config.llm.speculative == "mtp":
        spec = [*spec, *decoder_of(info).mtp_spec_of(info.text, tp_size)]
    num_drafts = most_drafts(config.llm)
    if device.type == "cuda":
        wait_for_vits(context, control)
    else:
        # A cache that cannot fit fails before the weights are loaded.
        gib = available_gib(config, device, state_bytes(spec, dtype), num_drafts)
        plan_cache(spec, info.text.max_position_embeddings, config, dtype, gib, num_drafts)
    rendezvous = _rendezvous(context, control, lead)
    # Subscribe before joining the group: rank 0 publishes nothing before it has seen every subscription.
    steps = context.sockets.subscriber(STEPS, rank=lead) if rank > 0 else None
    parallel = TensorParallel.connect(rank, tp_size, device, rendezvous, config.llm.expert_parallel)

    def progress(done: int, total: int) -> None:
        context.progress(LOADING, done, total)

    sharing = _sharing(context, device)
    runner: ModelRunner | None = None
    matchers = _MatcherThread(info) if rank == 0 else None
    try:
        runner = ModelRunner.load(info, config, context.model_folder, device, parallel, progress)
        runner.decoder.on_layer = context.recorder.move_in_step
        spec = runner.decoder.cache_spec()
        gib = available_gib(config, device, state_bytes(spec, dtype), num_drafts)
        gib = parallel.smallest(int(gib * GIB)) / GIB
        cache_plan = plan_cache(spec, info.text.max_position_embeddings, config, dtype, gib, num_drafts)
        runner.open_cache(*cache_plan)
        if rank == 0:
            kind, attention = str(dtype).removeprefix("torch."), type(runner.attention).__name__
            logger.info("the LLM computes in %s on %s, attention by %s", kind, device, attention)
            if states_of(spec):
                logger.info("linear attention by %s", linear_attention_of(runner.decoder.kernels).name)
        if matchers is not None:
            scheduler = make_scheduler(context, info, cache_plan, runner.decoder)
            _lead(context, control, scheduler, runner, matchers, cache_plan.max_model_len, sharing)
        else:
            assert steps is not None
            _follow(context, control, steps, runner, sharing)
    finally:
        if runner is not None:
            runner.close()
        parallel.close()
        if matchers is not None:
            matchers.executor.shutdown(wait=False, cancel_futures=True)


def _rendezvous(context: WorkerContext, control: Receiver[ControlMessage], lead: int) -> Path | Meeting:
    if context.cluster is not None and context.config.cluster.nodes_per_group > 1:
        return wait_for_meeting(context, context.cluster, control, lead)
    epoch = context.sockets.epochs[WorkerId(Role.LLM, lead)]
    return Path(context.spec.run_dir) / f"ranks.{lead}.{epoch}"


def _sharing(context: WorkerContext, device: torch.device) -> CoreSharing:
    is_on_cpu, placement = device.type == "cpu", context.spec.placement
    sharing = CoreSharing(
        Activity(Path(context.spec.run_dir)), context.worker,
        placement if is_on_cpu else dataclasses.replace(placement, wide_cores=()), torch.set_num_threads,
        spread=spread_threads if is_on_cpu else lambda cores: None,
    )  # fmt: skip
    sharing.bind()
    return sharing


class _MatcherThread:
    """The thread of rank 0 that starts matchers. It reads the tokens' texts while the weights are loaded."""

    def __init__(self, info: ModelInfo) -> None:
        self.wakeup, self.executor = Wakeup(), ThreadPoolExecutor(1, "matchers")
        self._rule = GrammarRule(GrammarVocabulary(info.folder, info.text.vocab_size, info.eos_token_ids))
        self._loading = self.executor.submit(self._rule.load)

    def starts(self) -> MatcherStarts:
        """Once the texts are read, so that it takes no time of steps."""
        self._loading.result()
        return MatcherStarts([self._rule], self.executor, self.wakeup.set)


def _lead(
    context: WorkerContext, control: Receiver[ControlMessage], scheduler: Scheduler, runner: ModelRunner,
    matchers: _MatcherThread, max_model_len: int, sharing: CoreSharing,
) -> None:  # fmt: skip
    sockets, config, lead = context.sockets, context.config, context.worker.rank
    inbox = sockets.receiver(LLM, lead)
    outputs = sockets.publisher(
        OUTPUTS, lambda topic, _: len(topic) == CLIENT_ID_BYTES, OUTPUTS_HIGH_WATER_MARK, lead
    )
    vits = [sockets.sender(ENCODE, index) for index in range(config.num_vits)]
    to_carrier, own = context.sender_to_carrier(), context.nodes.carrier
    carrier = None if to_carrier is None or own is None else (own, to_carrier)
    steps = sockets.publisher(STEPS, rank=lead) if config.llm.tp > 1 else None
    if steps is not None:
        wait_for_ranks(context, control, steps)
    links = Links(
        publish=outputs.publish, feedback=sockets.sender(FEEDBACK), vits=vits, carrier=carrier,
        publish_step=steps.publish if steps else None, on_first_token=context.on_first_token,
    )  # fmt: skip
    engine = Engine(
        context.origin, scheduler, runner, make_welcome(context, max_model_len), links, sockets.epochs,
        has_overlap=has_overlap(config.llm, runner.device),
        watch=Watch(tracer=context.tracer, record=context.recorder.record, metrics=context.metrics),
        matcher_starts=matchers.starts(), adapters=runner.adapters,
    )  # fmt: skip
    step_times = measure_steps(context, engine, max_model_len, sharing)
    blocks = scheduler.cache.blocks
    context.ready(
        config.max_requests_per_client,
        kv_blocks=blocks.num_blocks,
        block_size=blocks.block_size,
        max_model_len=max_model_len,
    )
    _serve(context, control, engine, inbox, outputs, matchers.wakeup, sharing, step_times)


def _serve(
    context: WorkerContext, control: Receiver[ControlMessage], engine: Engine, inbox: Receiver[LlmMessage],
    outputs: Publisher[OutputsMessage], wakeup: Wakeup, sharing: CoreSharing,
    step_times: Mapping[bool, StepTimes],
) -> None:  # fmt: skip
    poller, lending = Poller(inbox, outputs, control, wakeup), Lending()
    stats_due, stats_interval = 0.0, STATS_INTERVAL_S
    declare(context.metrics, engine, inbox)
    while True:
        context.recorder.move()
        now = time.monotonic()
        news = context.read_control(control)
        if news.is_draining:
            stats_due, stats_interval = 0.0, DRAIN_STATS_INTERVAL_S
        for dead in news.died:
            engine.on_death(dead, now)
            if dead.worker.role in (Role.VIT, Role.CARRIER):
                context.pool_closed(dead.worker, dead.epoch - 1)
        engine.on_subscriptions(outputs.subscriptions(), now)
        wakeup.clear()  # before the matchers are taken that it tells of
        read_inbox(inbox, engine.handle, now)
        if now >= stats_due:
            stats_due = now + stats_interval
            engine.tick(now)
            context.stats(len(engine.requests))
            if not engine.requests:
                engine.check_integrity()
        engine.stepper.is_wide = sharing.enter() if engine.has_work else sharing.adapt()
        budget = engine.scheduler.budget
        budget.step_times = step_times.get(engine.stepper.is_wide)
        is_busy = engine.step(now)
        sharing.leave()
        sharing.announce(is_busy)
        budget.is_prefill_deferred, budget.stretch = False, None
        if is_busy and sharing.takes_turns:
            step, num_waiting = engine.stepper.last_step, engine.scheduler.num_pictures_unanswered
            lending.observe(step, num_waiting)
            loan = lending.behind(step, budget.step_times, budget.has_prefill, sharing.is_awaited)
            budget.is_prefill_deferred, budget.stretch = loan.defers_prefill, loan.stretch
            sharing.lend(loan.seconds)
        elif not is_busy:
            poller.wait(max(0.0, stats_due - time.monotonic()))


def read_inbox(
    inbox: Receiver[LlmMessage], handle: Callable[[LlmMessage, float, list[memoryview]], None], now: float
) -> None:
    """Handles at most `MAX_MESSAGES_PER_STEP` messages; the rest stays in the socket and wakes the poller."""
    for _ in range(MAX_MESSAGES_PER_STEP):
        if (received := inbox.receive()) is None:
            return
        handle(received.message, now, received.frames)


def _follow(
    context: WorkerContext,
    control: Receiver[ControlMessage],
    steps: Receiver[StepsMessage],
    runner: ModelRunner,
    sharing: CoreSharing,
) -> None:
    def pool_closed(pool_id: str, epoch: int) -> None:
        context.pool_closed(parse_worker(pool_id), epoch)

    follower = Follower(runner, sharing.widen, pool_closed)
    poller = Poller(steps, control)
    context.ready()
    while True:
        context.recorder.move()
        context.read_control(control)
        while (received := steps.receive()) is not None:
            follower.handle(received.message)
        poller.wait(STATS_INTERVAL_S)
