"""Messages between the head's launcher and those of the other nodes: the edges reports and orders.

Both ends say again and again all that holds, so a message that is lost is made up for by the next.
"""

from __future__ import annotations

import msgspec

from pipeline.wire.base import Message
from pipeline.wire.control import PipelineState, StatusMessage, WorkerReady
from pipeline.wire.topology import WorkerId

NODE_ID_BYTES = 16  # random, new for each time that a node joins


class JoinRequest(Message, frozen=True, kw_only=True):
    """node → head: I know the token; take me in. Repeated until it is answered."""

    node_id: bytes
    node_rank: int
    version: str
    checkpoint: str  # a digest: see launcher/checkpoint_digest.py
    options: dict[str, str]  # those that all nodes must agree on
    public_key: bytes  # of the edges to this node's workers, in ZeroMQ's text form
    is_vit_only: bool = False


class WorkerReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One incarnation of a worker on a node."""

    worker: WorkerId
    epoch: int
    urls: dict[str, str]  # by the edge's name with its rank: where other nodes reach it
    exit_code: int | None = None  # None: it lives; set once it is reaped
    executed: tuple[bytes, ...] = ()  # digests of the requests that it executed when it died
    has_worked: bool = False  # it has computed a request
    ready: WorkerReady | None = None
    error: str = ""


class NodeReport(Message, frozen=True, kw_only=True):
    """node → head, at each change and once a second."""

    node_id: bytes
    number: int  # of this report; `NodeOrders.heard` acknowledges it
    workers: tuple[WorkerReport, ...]
    is_leaving: bool = False  # it finishes its open requests, and wants nothing new
    is_done: bool = False  # it has reaped all its workers, and starts no others


class StatusPassedOn(Message, frozen=True, kw_only=True):
    """node → head: a message that a worker of the node sent to its launcher."""

    node_id: bytes
    status: StatusMessage


# reports: a node's launcher → the head's
ReportMessage = JoinRequest | NodeReport | StatusPassedOn


class JoinRefused(Message, frozen=True, kw_only=True):
    """head → node: end, with this sentence."""

    reason: str


class NodeOrders(Message, frozen=True, kw_only=True):
    """head → node, with each `PipelineState`."""

    heard: int  # the number of the latest report that has arrived; 0: none
    # The incarnations that are to run; any other that runs there is to be killed.
    workers: tuple[tuple[WorkerId, int], ...]
    state: PipelineState  # for the node's workers
    may_leave: bool = False  # the node wanted to leave, and is not needed any more


# orders: the head's launcher → a node's, topic = `node_id`
OrdersMessage = JoinRefused | NodeOrders
