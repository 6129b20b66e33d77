"""Messages from and to the launcher: the edges control and status."""

from __future__ import annotations

import msgspec

from pipeline.wire.base import Message, PoolClosed, WorkerMessage
from pipeline.wire.metrics import Metric, Number
from pipeline.wire.topology import Role, WorkerId


class WorkerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: WorkerId
    epoch: int  # its incarnation: earlier ones are dead and reaped, and send no more messages
    is_ready: bool
    credits: int = 0
    # Digests of the requests that the incarnation before executed when it died, and that had yielded no token
    # there.
    executed: tuple[bytes, ...] = ()
    num_open_requests: int = 0
    # the latest of its stats, with the details of its READY
    counters: dict[str, Number] = msgspec.field(default_factory=dict)
    silent_s: float = 0.0  # since its last stats: after some seconds it is in one long piece of work
    metrics: tuple[Metric, ...] = ()  # what `counters` are, and histograms
    # Where workers of other nodes reach the edges that it binds, by the edge's name with its rank.
    urls: dict[str, str] = msgspec.field(default_factory=dict)


class NodeState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that has joined; the head is node 0."""

    rank: int
    public_key: bytes  # of the edges to its workers, in ZeroMQ's text form


class ReloadState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int = 0  # reloads asked for so far
    is_running: bool = False
    refusal: str = ""  # why the last one was refused
    # Of the weights, from 0: requests with tokens of an earlier generation are not resubmitted.
    generation: int = 0


class PipelineState(Message, frozen=True, kw_only=True):
    """launcher → everyone: all that a worker or a client has to know of the pipeline, at each change, once a
    second, and to each new subscriber: a message that is lost is made up for by the next."""

    workers: tuple[WorkerState, ...]
    leads: tuple[int, ...] = (0,)  # the LLM ranks that lead a group: clients listen to each
    is_draining: bool = False  # nothing new is accepted, and what is open is finished
    # Incarnations whose successors serve already: they accept no requests, finish the open ones, and end.
    retiring: tuple[tuple[WorkerId, int], ...] = ()
    end: str | None = None  # the pipeline ends now: empty at an orderly end, else which worker died of what
    reload: ReloadState = ReloadState()
    # By role: digests of the requests that workers of this role executed when they died, with no new token
    # since. In that role each of these requests runs alone.
    quarantined: dict[Role, tuple[bytes, ...]] = msgspec.field(default_factory=dict)
    nodes: tuple[NodeState, ...] = ()  # of a pipeline over several machines
    is_watched: bool = False  # somebody looks at the lanes: workers tell the api of their work


# control: launcher → everyone
ControlMessage = PipelineState


class WorkerReady(WorkerMessage, frozen=True, kw_only=True):
    """worker → launcher: loaded; what was learnt at run time, and how many requests may be open with me."""

    credits: int = 0
    details: dict[str, int] = msgspec.field(default_factory=dict)


class WorkerStats(WorkerMessage, frozen=True, kw_only=True):
    """worker → launcher: progress of loading, or counts while running. May be dropped."""

    phase: str
    done: int = 0
    total: int = 0
    num_open_requests: int = 0
    counters: dict[str, Number] = msgspec.field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()  # what they are, and histograms


class FirstTokenYielded(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → launcher: a request that was quarantined has yielded a new token. May be dropped."""

    digest: bytes  # of its id


class WorkerFailed(WorkerMessage, frozen=True, kw_only=True):
    """worker → launcher: I end because of this."""

    error: str


class ReloadRequested(WorkerMessage, frozen=True, kw_only=True):
    """api → launcher: an administrator asks for a reload."""


class KillRequested(WorkerMessage, frozen=True, kw_only=True):
    """api → launcher: an administrator asks that this worker be killed, and so replaced."""

    worker: WorkerId


class LanesWatched(WorkerMessage, frozen=True, kw_only=True):
    """api → launcher: somebody looks at the lanes; repeated while it is so."""

    seconds: float  # for which it is believed; 0: nobody looks any longer


# status: everyone → launcher
StatusMessage = (
    ReloadRequested
    | KillRequested
    | LanesWatched
    | WorkerReady
    | WorkerStats
    | WorkerFailed
    | PoolClosed
    | FirstTokenYielded
)
