"""The process of a carrier, one a node: drain → send a piece → drain → …

It takes the place of this node's workers towards other nodes, for messages that hold tensors: its gates are
bound where other nodes reach it, and what it passes on goes through the run directory.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pipeline.config import MIB
from pipeline.process.nodes import HEAD
from pipeline.process.process import WorkerContext
from pipeline.transport.ends import Receiver
from pipeline.transport.interfaces import interface_of
from pipeline.transport.poller import Poller
from pipeline.transport.slots import SlotAllocator, align, pool_size
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.control import WorkerState
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import CARRY, ENCODE, FEEDBACK, LLM, Role, WorkerId
from workers.carrier.core import CarrierCore, Parts
from workers.carrier.embeddings import EmbeddingCopies
from workers.carrier.metrics import declare
from workers.carrier.nixl import NixlTransport
from workers.carrier.nixl_agent import NixlAgent, load_nixl
from workers.carrier.pixels import PixelCopies
from workers.carrier.reads import Reads, Transport
from workers.carrier.source import PieceSource
from workers.carrier.transports import Transports
from workers.carrier.zeromq import ZeromqTransport
from workers.model_info import model_info_of
from workers.nn.loader import choose_device

logger = logging.getLogger(__name__)
MAX_SLOTS = 8192
# A transfer by NIXL that takes longer than the first is looked at in intervals of the second.
SPIN_S, POLL_S = 0.003, 0.001
STATS_INTERVAL_S = 1.0
MAX_MESSAGES = 64  # of one inbox in a turn: a flood on one must not hold up the others, nor the pieces
WIDEST_DTYPE = "float32"  # of embeddings: what "auto" becomes on other machines is not known here


class Inbox(NamedTuple):
    receiver: Receiver[Any]
    handle: Callable[[Any, Sequence[memoryview]], None]


class Largest(NamedTuple):
    """Bytes of one chunk."""

    pixels: int
    embedding: int


def main(context: WorkerContext) -> None:
    info, dtype = model_info_of(context), context.config.model.dtype
    embedding = info.vision.largest_embedding(WIDEST_DTYPE if dtype == "auto" else dtype)
    largest = Largest(info.largest_pixel_bytes, embedding.nbytes)
    serve(context, largest)


def serve(context: WorkerContext, largest: Largest) -> None:
    control = context.control()
    # bound first: messages of other workers queue from now on
    carry = context.sockets.receiver(CARRY, context.nodes.here)
    core = make_core(context, largest)
    inboxes = [
        Inbox(carry, core.on_carry),
        *open_gates(context, core),
    ]
    declare(context.metrics, core, [inbox.receiver for inbox in inboxes])
    core.start()
    context.ready()
    poller, stats_due, moved_at = Poller(control, *(inbox.receiver for inbox in inboxes)), 0.0, 0.0
    while True:
        context.recorder.move()
        for dead in context.read_control(control).died:
            core.on_death(dead)
            _tell_closed(context, dead)
        is_busy = read(inboxes)
        is_busy = core.work() or is_busy
        if (now := time.monotonic()) >= stats_due:
            stats_due = now + STATS_INTERVAL_S
            core.tick(now)
            context.stats(num_open_requests=0)
        if is_busy:
            moved_at = now
        poller.wait(_patience_s(core, now - moved_at, stats_due - now))


def _patience_s(core: CarrierCore, still_s: float, until_stats_s: float) -> float:
    """How long to sleep, if no message comes. NIXL wakes nobody: it is asked again and again."""
    if still_s <= 0.0:
        return 0.0
    if core.transports.is_busy:
        return 0.0 if still_s < SPIN_S else POLL_S
    return max(0.0, until_stats_s)


def _tell_closed(context: WorkerContext, dead: WorkerState) -> None:
    if dead.worker.role in (Role.PREPROCESS, Role.VIT):
        context.pool_closed(dead.worker, dead.epoch - 1)


def read(inboxes: Sequence[Inbox]) -> bool:
    """Handles some messages of each inbox. Whether there may be more."""
    has_more = False
    for receiver, handle in inboxes:
        for _ in range(MAX_MESSAGES):
            if (received := receiver.receive()) is None:
                break
            handle(received.message, received.frames)
        else:
            has_more = True
    return has_more


def vits_of(context: WorkerContext) -> list[int]:
    """The ViTs of this node that preprocess reaches through this carrier."""
    nodes = context.nodes
    return [] if nodes.here == HEAD else list(nodes.vits_on(nodes.here))


def leads_of(context: WorkerContext) -> Sequence[int]:
    return context.nodes.leads_here(context.config.leads)


def open_gates(context: WorkerContext, core: CarrierCore) -> list[Inbox]:
    """For the messages of other nodes to workers of this one."""
    inboxes: list[Inbox] = []
    for vit in vits_of(context):
        handle = functools.partial(_without_frames, functools.partial(core.on_encode, vit))
        inboxes.append(Inbox(context.sockets.gate(ENCODE, vit), handle))
    for lead in leads_of(context):
        handle = functools.partial(_without_frames, functools.partial(core.on_llm, lead))
        inboxes.append(Inbox(context.sockets.gate(LLM, lead), handle))
    return inboxes


def _without_frames(handle: Callable[[Any], None], message: Any, frames: Sequence[memoryview]) -> None:
    handle(message)


def make_core(context: WorkerContext, largest: Largest) -> CarrierCore:
    sockets, nodes = context.sockets, context.nodes
    peers = {node: sockets.sender(CARRY, node) for node in range(nodes.count) if node != nodes.here}

    def choose(node: int, source: TensorHandle) -> Transport:
        return transports.choose(node, source)

    reads = Reads(choose, time.monotonic, context.epoch)
    feedback = sockets.sender(FEEDBACK)
    pixels = embeddings = None
    if vits := {vit: sockets.sender(ENCODE, vit) for vit in vits_of(context)}:
        pixels = PixelCopies(context.origin, *_make_pool(context, largest.pixels), vits, feedback, reads)
    if llms := {lead: sockets.sender(LLM, lead) for lead in leads_of(context)}:
        far = [WorkerId(Role.VIT, vit) for vit in range(context.config.num_vits)]
        far_vits = {vit: sockets.sender(ENCODE, vit.rank) for vit in far if nodes.of(vit) != nodes.here}
        embeddings = EmbeddingCopies(
            context.origin, *_make_pool(context, largest.embedding), llms, far_vits, reads,
            context.epoch_of, nodes.of,
        )  # fmt: skip
    pools = PoolMap(_ordinal(context))
    own = [half.pool for half in (pixels, embeddings) if half is not None]
    shared = share_memory(context, own, pools, reads)
    transports = Transports(context.origin, peers, ZeromqTransport(context.origin, peers), shared)
    source = PieceSource(context.origin, pools, peers, context.epoch_of)
    parts = Parts(reads=reads, source=source, transports=transports, pixels=pixels, embeddings=embeddings)
    return CarrierCore(context.epoch_of, parts, vits_of(context), leads_of(context))


def _ordinal(context: WorkerContext) -> int | None:
    """The GPU through which pools on this node's GPUs are read, if there is any. Never run so far."""
    device = choose_device(context.config.model.device, context.spec.placement.device, is_shared=True)
    return device.index if device.type == "cuda" else None


def share_memory(
    context: WorkerContext, own: Sequence[TensorPool], mapped: PoolMap, reads: Reads
) -> NixlTransport | None:
    """Raises ValueError where NIXL is asked for and missing."""
    wanted = context.config.carrier.carrier
    if wanted == "zeromq":
        return None
    if (nixl := load_nixl()) is None:
        if wanted == "nixl":
            raise ValueError(
                "carrier 'nixl' needs NIXL, which is not installed here: the extra [cluster] has it"
            )
        logger.info("NIXL is not installed: tensors travel between nodes by messages")
        return None
    interface = interface_of(context.config.cluster.node_address)
    agent = NixlAgent(nixl, f"{context.worker}.{context.epoch}", interface)
    return NixlTransport(agent, own, mapped, reads.end)


def _make_pool(context: WorkerContext, largest: int) -> tuple[TensorPool, SlotAllocator]:
    """ViTs map one, LLM ranks the other, under the same name: no process maps both."""
    largest = align(largest)
    nbytes = pool_size(context.config.carrier.carrier_pool_mib * MIB, largest)
    pool = TensorPool.on_host(str(context.worker), context.epoch, nbytes, MAX_SLOTS)
    return pool, SlotAllocator(nbytes, largest, MAX_SLOTS)
