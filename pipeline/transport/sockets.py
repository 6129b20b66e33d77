"""Opens the edges of `topology.py`: the socket type, the messages and the site of each end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

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
from pipeline.wire.clients import IngestMessage, OutputsMessage
from pipeline.wire.control import ControlMessage, StatusMessage
from pipeline.wire.encoding import EncodeMessage, FeedbackMessage
from pipeline.wire.errors import PipelineError
from pipeline.wire.generation import LlmMessage
from pipeline.wire.lanes import LanesMessage
from pipeline.wire.steps import StepsMessage
from pipeline.wire.topology import (
    CONTROL,
    ENCODE,
    FEEDBACK,
    INGEST,
    LANES,
    LLM,
    OUTPUTS,
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
    LANES: LanesMessage,
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
    ) -> None:
        self.site: Site = RunDirectory(site) if isinstance(site, Path) else site
        self._elsewhere = dict(elsewhere or {})
        self._encoder = encoder
        self.epochs = dict(epochs)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.setsockopt(zmq.BLOCKY, False)
        self._async_context = zmq.asyncio.Context.shadow(self._context)
        self._sites = list(dict.fromkeys([self.site, *self._elsewhere.values()]))
        for opened in self._sites:
            opened.open(self._context)
        self._opened: list[Sender[Any] | Receiver[Any] | AsyncReceiver[Any] | Publisher[Any]] = []
        self._bound: list[tuple[str, Any]] = []  # urls and sockets
        # Reconnected when the worker that binds the edge has a successor.
        self._connected: list[tuple[EdgeEnd, Sender[Any] | Relayed[Any] | AsyncReceiver[Any]]] = []

    def site_of(self, edge: Edge, rank: int = 0) -> Site:
        return self._elsewhere.get(EdgeEnd(edge, rank), self.site)

    def _keep(self, opened: S) -> S:
        self._opened.append(opened)
        return opened

    def follow(self, epochs: Mapping[WorkerId, int]) -> list[WorkerId]:
        """Takes over newer epochs and reconnects the edges of workers that died to their successors.

        Returns the workers with newer epochs.
        """
        renewed = [worker for worker, epoch in epochs.items() if epoch > self.epochs.get(worker, 0)]
        self.epochs.update({worker: epochs[worker] for worker in renewed})
        for (edge, rank), opened in self._connected:
            if self.site_of(edge, rank).follows_epochs and WorkerId(edge.binder, rank) in renewed:
                opened.reconnect(self._url(edge, rank))
        return renewed

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
        return sender

    def receiver(
        self, edge: Edge, rank: int = 0, max_message_bytes: int = 0, high_water_mark: int = HIGH_WATER_MARK
    ) -> Receiver[Any]:
        socket = self._pull(self._context, edge, rank, max_message_bytes, high_water_mark)
        is_authenticated = self.site_of(edge, rank).is_authenticated
        return self._keep(Receiver(socket, UNIONS[edge], self._url(edge, rank), is_authenticated))

    def async_receiver(
        self, edge: Edge, rank: int = 0, max_message_bytes: int = 0, high_water_mark: int = HIGH_WATER_MARK
    ) -> AsyncReceiver[Any]:
        socket = self._pull(self._async_context, edge, rank, max_message_bytes, high_water_mark)
        return self._keep(AsyncReceiver(socket, UNIONS[edge], self._url(edge, rank)))

    def _pull(self, context: Any, edge: Edge, rank: int, max_message_bytes: int, high_water_mark: int) -> Any:
        assert edge.pattern is Pattern.PUSH_PULL
        socket = self._socket(context, zmq.PULL, edge, rank)
        socket.setsockopt(zmq.RCVHWM, high_water_mark)
        if max_message_bytes:
            socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        self._bind(socket, self._url(edge, rank))
        return socket

    # PUB and SUB.

    def publisher(
        self, edge: Edge, accepts: Callable[[bytes, str], bool] = lambda topic, _: topic == ALL,
        high_water_mark: int = 1024, rank: int = 0,
    ) -> Publisher[Any]:  # fmt: skip
        assert edge.pattern is Pattern.PUB_SUB
        socket = self._socket(self._context, zmq.XPUB, edge, rank)
        # With NODROP one full queue refuses a message for all subscribers of its topic. Messages on `control`
        # are repeated every second: there only the subscriber with the full queue loses them.
        socket.setsockopt(zmq.XPUB_NODROP, int(edge is not CONTROL))
        socket.setsockopt(zmq.XPUB_MANUAL, 1)
        socket.setsockopt(zmq.SNDHWM, high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION_BYTES)
        self._bind(socket, self._url(edge, rank))
        is_authenticated = self.site_of(edge, rank).is_authenticated
        return self._keep(Publisher(socket, accepts, self._encoder, is_authenticated))

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
        socket.connect(self._url(edge, rank))
        return socket

    def close(self, linger_ms: int = 0) -> None:
        """Closes all sockets; queued messages have `linger_ms` to leave."""
        for opened in self._opened:
            opened.close(linger_ms)
        for site in self._sites:
            site.close()
        self._context.term()
