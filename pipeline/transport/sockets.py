"""Opens the edges of `topology.py`: the socket type, the messages and the site of each end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from pipeline.transport.cluster import Cluster, FarSite, label_of
from pipeline.transport.ends import (
    ALL,
    HIGH_WATER_MARK,
    AsyncReceiver,
    MessageEncoder,
    Publisher,
    Receiver,
    Relayed,
    Sender,
)
from pipeline.transport.sites import EdgeEnd, RunDirectory, Site
from pipeline.wire.carrying import CarryMessage
from pipeline.wire.clients import IngestMessage, OutputsMessage
from pipeline.wire.control import ControlMessage, PipelineState, StatusMessage
from pipeline.wire.encoding import EncodeMessage, FeedbackMessage
from pipeline.wire.errors import PipelineError
from pipeline.wire.generation import LlmMessage
from pipeline.wire.lanes import LanesMessage
from pipeline.wire.nodes import OrdersMessage, ReportMessage
from pipeline.wire.steps import StepsMessage
from pipeline.wire.topology import (
    CARRY,
    CONTROL,
    ENCODE,
    FEEDBACK,
    INGEST,
    LANES,
    LLM,
    ORDERS,
    OUTPUTS,
    REPORTS,
    STATUS,
    STEPS,
    Edge,
    Pattern,
    WorkerId,
)

IPC = "ipc://"
MAX_SUBSCRIPTION_BYTES = 4096  # far more than a topic has, or a handshake
UNIONS: dict[Edge, Any] = {
    INGEST: IngestMessage, ENCODE: EncodeMessage, FEEDBACK: FeedbackMessage, LLM: LlmMessage,
    STEPS: StepsMessage, OUTPUTS: OutputsMessage, CONTROL: ControlMessage, STATUS: StatusMessage,
    LANES: LanesMessage, CARRY: CarryMessage, REPORTS: ReportMessage, ORDERS: OrdersMessage,
}  # fmt: skip

S = TypeVar("S", bound="Sender[Any] | Receiver[Any] | AsyncReceiver[Any] | Publisher[Any]")


class Sockets:
    """Opens the edges of one process: those in `elsewhere` at the sites given there, all others at `site`.

    `epochs` are those of the workers that bind the edges.
    """

    def __init__(
        self,
        site: Path | Site,
        epochs: Mapping[WorkerId, int],
        encoder: MessageEncoder | None = None,
        elsewhere: Mapping[EdgeEnd, Site] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        """`cluster`: of a pipeline over several nodes."""
        self.site: Site = RunDirectory(site) if isinstance(site, Path) else site
        self._elsewhere, self._cluster = dict(elsewhere or {}), cluster
        self._encoder = encoder
        self.epochs = dict(epochs)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.setsockopt(zmq.BLOCKY, False)
        self._async_context = zmq.asyncio.Context.shadow(self._context)
        self._sites = list(dict.fromkeys([self.site, *self._elsewhere.values()]))
        for opened in self._sites:
            opened.open(self._context)
        if cluster is not None:
            cluster.doors.open(self._context)
        self._opened: list[Sender[Any] | Receiver[Any] | AsyncReceiver[Any] | Publisher[Any]] = []
        self._bound: list[tuple[str, Any]] = []  # urls and sockets
        # Reconnected when the worker that binds the edge has a successor.
        self._connected: list[tuple[EdgeEnd, Sender[Any] | Relayed[Any] | AsyncReceiver[Any]]] = []

    def reach(self, cluster: Cluster) -> None:
        """From now on edges lead to other nodes, too."""
        self._cluster = cluster

    def site_of(self, edge: Edge, rank: int = 0) -> Site:
        if (site := self._elsewhere.get(EdgeEnd(edge, rank))) is not None:
            return site
        far = None if self._cluster is None else self._cluster.site_of(edge, rank)
        return self.site if far is None else far

    def _keep(self, opened: S) -> S:
        self._opened.append(opened)
        return opened

    def follow(self, state: PipelineState) -> list[WorkerId]:
        """Takes over newer epochs and reconnects the edges of workers that died to their successors.

        Returns the workers with newer epochs, and those of other nodes whose address is lost, as their
        carrier's is that has died: what was sent to such a one before is lost.
        """
        epochs = {worker.worker: worker.epoch for worker in state.workers}
        renewed = [worker for worker, epoch in epochs.items() if epoch > self.epochs.get(worker, 0)]
        self.epochs.update({worker: epochs[worker] for worker in renewed})
        if self._cluster is not None:
            self._cluster.addresses.learn(state)
        lost = [
            WorkerId(edge.binder, rank)
            for (edge, rank), opened in self._connected
            if self.site_of(edge, rank).follows_epochs and self._follow(edge, rank, opened, renewed)
        ]
        return list(dict.fromkeys([*renewed, *lost]))

    def _follow(
        self, edge: Edge, rank: int, opened: Sender[Any] | Relayed[Any] | AsyncReceiver[Any],
        renewed: Sequence[WorkerId],
    ) -> bool:  # fmt: skip
        """Reconnects one edge, if it has to be. Whether what was sent to another node before is lost."""
        site, url, before = self.site_of(edge, rank), self._url(edge, rank), opened.url
        if not isinstance(site, FarSite):
            if url != before:
                opened.reconnect(url)
            return False
        has_died = site.peer(edge, rank) in renewed
        is_lost = has_died or bool(before)
        if url == before and not has_died:
            return False
        if isinstance(opened, Sender):
            is_lost |= opened.drops
            opened.reconnect(url, self._is_starting(edge, rank), is_lost)
        elif url != before:
            site.prepare(opened.socket)  # a sender takes a new socket
            opened.reconnect(url)
        return is_lost

    def _is_starting(self, edge: Edge, rank: int) -> bool:
        """Whether the peer of another node will have an address, if it has none."""
        site = self.site_of(edge, rank)
        return isinstance(site, FarSite) and site.is_joined and self.epochs.get(site.peer(edge, rank), 0) > 0

    def bind_again(self) -> list[str]:
        """Makes removed socket files anew; a cleaner of /tmp may have removed them. Returns their paths.

        Open connections are kept. Raises PipelineError where the folder is gone, too.
        """
        files = [(url.removeprefix(IPC), socket) for url, socket in self._bound if url.startswith(IPC)]
        missing = [(path, socket) for path, socket in files if not os.path.exists(path)]
        for path, socket in missing:
            try:
                socket.bind(IPC + path)
            except zmq.ZMQError as error:
                raise PipelineError(f"{path} was removed and cannot be made again: {error}") from None
        return [path for path, _ in missing]

    def _bind(self, socket: Any, url: str) -> None:
        socket.bind(url)
        self._bound.append((url, socket))

    def _url(self, edge: Edge, rank: int) -> str:
        return self.site_of(edge, rank).url(edge, self.epochs, rank)

    def _socket(self, context: Any, kind: int, edge: Edge, rank: int) -> Any:
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        self.site_of(edge, rank).prepare(socket)
        return socket

    # PUSH and PULL.

    def sender(self, edge: Edge, rank: int = 0, high_water_mark: int = HIGH_WATER_MARK) -> Sender[Any]:
        assert edge.pattern is Pattern.PUSH_PULL
        sender: Sender[Any] = self._keep(
            Sender(
                lambda: self._socket(self._context, zmq.PUSH, edge, rank),
                self._url(edge, rank),
                high_water_mark,
                self._encoder,
            )
        )
        self._connected.append((EdgeEnd(edge, rank), sender))
        if not sender.url and self._is_starting(edge, rank):
            sender.reconnect("", is_starting=True)
        return sender

    def receiver(
        self, edge: Edge, rank: int = 0, max_message_bytes: int = 0, high_water_mark: int = HIGH_WATER_MARK
    ) -> Receiver[Any]:
        assert edge.pattern is Pattern.PUSH_PULL
        options = _pull_options(max_message_bytes, high_water_mark)
        bound, door = self._bound_ends(self._context, zmq.PULL, edge, rank, options)
        is_authenticated = self.site_of(edge, rank).is_authenticated
        return self._keep(Receiver(bound, UNIONS[edge], self._url(edge, rank), is_authenticated, door))

    def gate(self, edge: Edge, rank: int = 0) -> Receiver[Any]:
        """The end of an edge that a carrier binds for other nodes, in the place of the edge's binder."""
        assert edge.pattern is Pattern.PUSH_PULL
        assert self._cluster is not None
        door = self._door(self._context, zmq.PULL, edge, rank, _pull_options(0, HIGH_WATER_MARK))
        return self._keep(Receiver(door, UNIONS[edge], label_of(edge, rank)))

    def async_receiver(
        self, edge: Edge, rank: int = 0, max_message_bytes: int = 0, high_water_mark: int = HIGH_WATER_MARK
    ) -> AsyncReceiver[Any]:
        assert edge.pattern is Pattern.PUSH_PULL
        options = _pull_options(max_message_bytes, high_water_mark)
        bound, door = self._bound_ends(self._async_context, zmq.PULL, edge, rank, options)
        return self._keep(AsyncReceiver(bound, UNIONS[edge], self._url(edge, rank), door))

    def _bound_ends(
        self, context: Any, kind: int, edge: Edge, rank: int, options: Mapping[zmq.SocketOption, int]
    ) -> tuple[Any, Any]:
        """The socket of this node, and that for other nodes, if this worker has one."""
        bound = self._socket(context, kind, edge, rank)
        _set(bound, options)
        self._bind(bound, self._url(edge, rank))
        if self._cluster is None or not self._cluster.doors.has(label_of(edge, rank)):
            return bound, None
        return bound, self._door(context, kind, edge, rank, options)

    def _door(
        self, context: Any, kind: int, edge: Edge, rank: int, options: Mapping[zmq.SocketOption, int]
    ) -> Any:
        assert self._cluster is not None
        door = context.socket(kind)
        _set(door, {zmq.LINGER: 0, **options})
        self._cluster.doors.bind(door, label_of(edge, rank))
        return door

    # PUB and SUB.

    def publisher(
        self, edge: Edge, accepts: Callable[[bytes, str], bool] = lambda topic, _: topic == ALL,
        high_water_mark: int = 1024, rank: int = 0,
    ) -> Publisher[Any]:  # fmt: skip
        assert edge.pattern is Pattern.PUB_SUB
        # With NODROP one full queue refuses a message for all subscribers of its topic. Messages on `control`
        # and `orders` are repeated every second: there only the subscriber with the full queue loses them.
        options = {
            zmq.XPUB_NODROP: int(edge not in (CONTROL, ORDERS)),
            zmq.XPUB_MANUAL: 1,
            zmq.SNDHWM: high_water_mark,
            zmq.MAXMSGSIZE: MAX_SUBSCRIPTION_BYTES,
        }
        bound, door = self._bound_ends(self._context, zmq.XPUB, edge, rank, options)
        is_authenticated = self.site_of(edge, rank).is_authenticated
        return self._keep(Publisher(bound, accepts, self._encoder, is_authenticated, door))

    def subscriber(self, edge: Edge, topic: bytes = ALL, rank: int = 0) -> Receiver[Any]:
        socket = self._sub(self._context, edge, rank)
        socket.setsockopt(zmq.SUBSCRIBE, topic)
        return self._keep(Receiver(socket, UNIONS[edge], self._url(edge, rank)))

    def relayed(self, edge: Edge, rank: int = 0) -> Relayed[Any]:
        relayed: Relayed[Any] = self._keep(
            Relayed(self._sub(self._context, edge, rank), UNIONS[edge], self._url(edge, rank))
        )
        self._connected.append((EdgeEnd(edge, rank), relayed))
        return relayed

    def async_subscriber(self, edge: Edge, topic: bytes = ALL, rank: int = 0) -> AsyncReceiver[Any]:
        socket = self._sub(self._async_context, edge, rank)
        socket.setsockopt(zmq.SUBSCRIBE, topic)
        subscriber: AsyncReceiver[Any] = self._keep(
            AsyncReceiver(socket, UNIONS[edge], self._url(edge, rank))
        )
        self._connected.append((EdgeEnd(edge, rank), subscriber))
        return subscriber

    def _sub(self, context: Any, edge: Edge, rank: int) -> Any:
        assert edge.pattern is Pattern.PUB_SUB
        socket = self._socket(context, zmq.SUB, edge, rank)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)  # ms: the binder may start later
        if url := self._url(edge, rank):
            socket.connect(url)
        return socket

    def close(self, linger_ms: int = 0) -> None:
        """Closes all sockets; queued messages have `linger_ms` to leave."""
        for opened in self._opened:
            opened.close(linger_ms)
        for site in self._sites:
            site.close()
        if self._cluster is not None:
            self._cluster.doors.close()
        self._context.term()


def _pull_options(max_message_bytes: int, high_water_mark: int) -> dict[zmq.SocketOption, int]:
    options = {zmq.RCVHWM: high_water_mark}
    return {**options, zmq.MAXMSGSIZE: max_message_bytes} if max_message_bytes else options


def _set(socket: Any, options: Mapping[zmq.SocketOption, int]) -> None:
    for name, value in options.items():
        socket.setsockopt(name, value)
