"""The only file that knows ZeroMQ: typed senders and receivers for the edges of `topology.py`.

Nothing here ever blocks in a send. What must arrive goes over PUSH/PULL, bounded by credits far below the high-water mark, so
that reaching the mark is an error of the pipeline. What is published goes over XPUB with NODROP: a full queue is reported,
never dropped in silence. A message that cannot be decoded is refused and counted; nothing dies of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
import zmq
import zmq.asyncio

from pipeline.config import MAX_ITEMS
from pipeline.errors import PipelineError, RequestError
from pipeline.messages import (
    ControlMessage,
    EncodeMessage,
    FeedbackMessage,
    IngestMessage,
    LlmMessage,
    OutputsMessage,
    StatusMessage,
    StepsMessage,
)
from pipeline.topology import CONTROL, ENCODE, FEEDBACK, INGEST, LLM, OUTPUTS, STATUS, STEPS, Edge, Pattern, WorkerId, address

HIGH_WATER_MARK = 1 << 18  # messages; credits keep every edge below it (see PreprocessConfig)
MAX_FRAMES = 1 + MAX_ITEMS  # of one multipart message
ALL = b""  # topic of edges on which every subscriber gets everything
UNIONS: dict[Edge, Any] = {
    INGEST: IngestMessage, ENCODE: EncodeMessage, FEEDBACK: FeedbackMessage, LLM: LlmMessage,
    STEPS: StepsMessage, OUTPUTS: OutputsMessage, CONTROL: ControlMessage, STATUS: StatusMessage,
}  # fmt: skip

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)


S = TypeVar("S", bound="Sender[Any] | Receiver[Any] | AsyncReceiver[Any] | Publisher[Any]")


class Received(NamedTuple, Generic[M]):
    message: M
    frames: list[memoryview]


class Subscription(NamedTuple):
    topic: bytes
    is_new: bool  # False: the subscriber left or died


class Wakeup:
    """Lets a helper thread wake a loop that polls."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Encoder(Protocol):
    """msgspec's; or, in tests of faults, one that spoils messages, or says None for those that are to be lost."""

    def encode(self, message: Any, /) -> bytes | None: ...


class Sink(Protocol[M_contra]):
    """What a worker core needs of a sender; tests give it a list."""

    def send(self, message: M_contra, frames: Sequence[bytes | memoryview] = ()) -> None: ...


class Sender(Generic[M]):
    """PUSH end of an edge. One peer; messages queue until it is there."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], url: str, high_water_mark: int = HIGH_WATER_MARK, encoder: Encoder | None = None
    ) -> None:
        self._context, self._high_water_mark = context, high_water_mark
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self._socket = self._connect(url)
        self.url = url

    def _connect(self, url: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, self._high_water_mark)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(url)
        return socket

    def send(self, message: M, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Raises PipelineError when the queue is full: credits should have made that impossible."""
        if not self.try_send(message, frames):
            raise PipelineError(f"the queue to {self.url} is full at {self._high_water_mark} messages")

    def try_send(self, message: M, frames: Sequence[bytes | memoryview] = ()) -> bool:
        """False when the queue is full. For what may be dropped, such as statistics."""
        if (data := self._encoder.encode(message)) is None:
            return True
        try:
            self._socket.send_multipart([data, *frames], zmq.NOBLOCK, copy=not frames)
        except zmq.Again:
            return False
        return True

    def reconnect(self, url: str) -> None:
        """To the successor of a dead peer. What was queued for the dead one is gone, and does not reach its successor."""
        self._socket.close(linger=0)
        self._socket, self.url = self._connect(url), url

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)


class _Decoding(Generic[M]):
    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self.num_refused = 0

    def decode(self, parts: list[zmq.Frame]) -> Received[M] | None:
        if len(parts) <= MAX_FRAMES:
            try:
                return Received(self._decoder.decode(parts[0].buffer), [part.buffer for part in parts[1:]])
            except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RequestError):
                pass
        self.num_refused += 1
        return None


class Receiver(Generic[M]):
    """PULL end of an edge, or SUB with one topic: `receive` never blocks."""

    def __init__(self, socket: zmq.Socket[bytes], union: Any) -> None:
        self.socket = socket
        self._decoding = _Decoding[M](union)
        self._has_topic = socket.type == zmq.SUB

    @property
    def num_refused(self) -> int:
        return self._decoding.num_refused

    def receive(self) -> Received[M] | None:
        """The next well-formed message, or None when there is none."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            if (received := self._decoding.decode(parts[self._has_topic :])) is not None:
                return received

    def close(self, linger_ms: int = 0) -> None:
        self.socket.close(linger=linger_ms)


class AsyncReceiver(Generic[M]):
    """The same for asyncio."""

    def __init__(self, socket: zmq.asyncio.Socket, union: Any, url: str) -> None:
        self.socket, self.url = socket, url
        self._decoding = _Decoding[M](union)
        self._has_topic = socket.type == zmq.SUB

    @property
    def num_refused(self) -> int:
        return self._decoding.num_refused

    def reconnect(self, url: str) -> None:
        """A subscriber: to the successor of a dead publisher."""
        self.socket.disconnect(self.url)
        self.socket.connect(url)
        self.url = url

    async def receive(self) -> Received[M]:
        while True:
            parts = await self.socket.recv_multipart(copy=False)
            if (received := self._decoding.decode(parts[self._has_topic :])) is not None:
                return received

    def subscribe_again(self, topic: bytes) -> None:
        """Makes the publisher see the subscription anew: a SUB reconnects only when it is used."""
        self.socket.setsockopt(zmq.UNSUBSCRIBE, topic)
        self.socket.setsockopt(zmq.SUBSCRIBE, topic)

    def close(self, linger_ms: int = 0) -> None:
        self.socket.close(linger=linger_ms)


class Publisher(Generic[M]):
    """XPUB end of an edge. Only topics that `accepts` allows are ever served, each to whoever asked for it exactly."""

    def __init__(self, socket: zmq.Socket[bytes], accepts: Callable[[bytes], bool], encoder: Encoder | None = None) -> None:
        self.socket = socket
        self._accepts = accepts
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self.num_refused = 0

    def subscriptions(self) -> list[Subscription]:
        """Subscribers that came or went since the last call."""
        seen: list[Subscription] = []
        while True:
            try:
                event = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return seen
            if event[:1] not in (b"\0", b"\1"):
                continue
            topic, is_new = event[1:], event[0] == 1
            if not self._accepts(topic):
                self.num_refused += is_new
                continue
            self.socket.setsockopt(zmq.SUBSCRIBE if is_new else zmq.UNSUBSCRIBE, topic)
            seen.append(Subscription(topic, is_new))

    def publish(self, message: M, topic: bytes = ALL) -> bool:
        """False: a subscriber of this topic does not keep up. Without subscribers the message is gone, and that is True."""
        if (data := self._encoder.encode(message)) is None:
            return True
        try:
            self.socket.send_multipart([topic, data], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self, linger_ms: int = 0) -> None:
        self.socket.close(linger=linger_ms)


class Pollable(Protocol):
    def fileno(self) -> int: ...


class Poller:
    """Sleeps until one of its sources has something. The loop then drains all of them, so it need not know which."""

    def __init__(self, *sources: Receiver[Any] | Publisher[Any] | Pollable) -> None:
        self._poller = zmq.Poller()
        for source in sources:
            self.add(source)

    def add(self, source: Receiver[Any] | Publisher[Any] | Pollable) -> None:
        self._poller.register(source.socket if isinstance(source, Receiver | Publisher) else source.fileno(), zmq.POLLIN)

    def remove(self, source: Pollable) -> None:
        self._poller.unregister(source.fileno())

    def wait(self, timeout_s: float | None = None) -> None:
        self._poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000)))


class Sockets:
    """Opens the edges of one process. `epochs` are those of the workers that bind them."""

    def __init__(self, run_dir: Path, epochs: Mapping[WorkerId, int], encoder: Encoder | None = None) -> None:
        self.run_dir, self._encoder = run_dir, encoder
        self.epochs = dict(epochs)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.setsockopt(zmq.BLOCKY, False)
        self._async_context = zmq.asyncio.Context.shadow(self._context)
        self._opened: list[Sender[Any] | Receiver[Any] | AsyncReceiver[Any] | Publisher[Any]] = []
        self._connected: list[tuple[Edge, int, Sender[Any] | AsyncReceiver[Any]]] = []  # to another worker, in time to its successor

    def _keep(self, opened: S) -> S:
        self._opened.append(opened)
        return opened

    def follow(self, epochs: Mapping[WorkerId, int]) -> list[WorkerId]:
        """Takes newer epochs over: what was connected to a worker that died is connected to its successor. Returns those workers."""
        renewed = [worker for worker, epoch in epochs.items() if epoch > self.epochs.get(worker, 0)]
        self.epochs.update({worker: epochs[worker] for worker in renewed})
        for edge, rank, opened in self._connected:
            if WorkerId(edge.binder, rank) in renewed:
                opened.reconnect(self._url(edge, rank))
        return renewed

    def _url(self, edge: Edge, rank: int) -> str:
        return address(self.run_dir, edge, self.epochs, rank)

    def sender(self, edge: Edge, rank: int = 0, high_water_mark: int = HIGH_WATER_MARK) -> Sender[Any]:
        assert edge.pattern is Pattern.PUSH_PULL
        sender: Sender[Any] = self._keep(Sender(self._context, self._url(edge, rank), high_water_mark, self._encoder))
        self._connected.append((edge, rank, sender))
        return sender

    def receiver(self, edge: Edge, rank: int = 0) -> Receiver[Any]:
        return self._keep(Receiver(self._pull(self._context, edge, rank, 0), UNIONS[edge]))

    def async_receiver(self, edge: Edge, rank: int = 0, max_message_bytes: int = 0) -> AsyncReceiver[Any]:
        return self._keep(AsyncReceiver(self._pull(self._async_context, edge, rank, max_message_bytes), UNIONS[edge], self._url(edge, rank)))

    def _pull(self, context: Any, edge: Edge, rank: int, max_message_bytes: int) -> Any:
        assert edge.pattern is Pattern.PUSH_PULL
        socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, 0)
        if max_message_bytes:
            socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        socket.bind(self._url(edge, rank))
        return socket

    def publisher(
        self, edge: Edge, accepts: Callable[[bytes], bool] = lambda topic: topic == ALL, high_water_mark: int = 1024, rank: int = 0
    ) -> Publisher[Any]:
        assert edge.pattern is Pattern.PUB_SUB
        socket = self._context.socket(zmq.XPUB)
        socket.setsockopt(zmq.XPUB_NODROP, 1)
        socket.setsockopt(zmq.XPUB_MANUAL, 1)
        socket.setsockopt(zmq.SNDHWM, high_water_mark)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self._url(edge, rank))
        return self._keep(Publisher(socket, accepts, self._encoder))

    def subscriber(self, edge: Edge, topic: bytes = ALL, rank: int = 0) -> Receiver[Any]:
        return self._keep(Receiver(self._sub(self._context, edge, topic, rank), UNIONS[edge]))

    def async_subscriber(self, edge: Edge, topic: bytes = ALL, rank: int = 0) -> AsyncReceiver[Any]:
        subscriber: AsyncReceiver[Any] = self._keep(
            AsyncReceiver(self._sub(self._async_context, edge, topic, rank), UNIONS[edge], self._url(edge, rank))
        )
        self._connected.append((edge, rank, subscriber))
        return subscriber

    def _sub(self, context: Any, edge: Edge, topic: bytes, rank: int) -> Any:
        assert edge.pattern is Pattern.PUB_SUB
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)  # ms: the binder may start after us
        socket.connect(self._url(edge, rank))
        socket.setsockopt(zmq.SUBSCRIBE, topic)
        return socket

    def close(self, linger_ms: int = 0) -> None:
        """Closes all that was opened, giving queued messages `linger_ms` to leave."""
        for opened in self._opened:
            opened.close(linger_ms)
        self._context.term()
