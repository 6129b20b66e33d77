"""The ends of edges: typed senders, receivers and publishers over ZeroMQ sockets.

No send blocks. PUSH/PULL edges are bounded by credits far below the high-water mark: a full queue there is an
error of the pipeline. PUB/SUB edges use XPUB with NODROP, so that a full queue is reported; `control` alone
drops messages for a subscriber that does not read, since the next heartbeat repeats them. A message that
cannot be decoded is refused and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
import zmq
import zmq.asyncio

from pipeline.wire.errors import PipelineError
from pipeline.wire.limits import MAX_ITEMS

HIGH_WATER_MARK = 1 << 18  # messages; credits keep every edge below it (see PreprocessConfig)
MAX_FRAMES = 1 + MAX_ITEMS  # of one multipart message
MAX_GARBAGE = 64  # undecodable messages in a row, after which `receive` returns to its loop
MAX_EVENTS = 1024  # subscriptions read at once; the rest is read in the loop's next turn
ALL = b""  # topic of edges on which every subscriber gets everything
USER_ID = "User-Id"  # as ZeroMQ calls the property

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)


class Received(NamedTuple, Generic[M]):
    message: M
    frames: list[memoryview]
    user: str = ""  # the sender's public key, on authenticated edges


class Subscription(NamedTuple):
    topic: bytes
    is_new: bool  # False: the subscriber left or died


class MessageEncoder(Protocol):
    """msgspec's; or, in tests of faults, one that corrupts messages, or returns None to drop one."""

    def encode(self, message: Any, /) -> bytes | None: ...


class Sink(Protocol[M_contra]):
    """The part of a sender that a worker core uses; tests pass a list instead."""

    def send(self, message: M_contra, frames: Sequence[bytes | memoryview] = ()) -> None: ...


class Sender(Generic[M]):
    """PUSH end of an edge to one peer. Messages queue until the peer is connected."""

    def __init__(
        self,
        open_socket: Callable[[], Any],
        url: str,
        high_water_mark: int = HIGH_WATER_MARK,
        encoder: MessageEncoder | None = None,
    ) -> None:
        self._open_socket, self._high_water_mark = open_socket, high_water_mark
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self._socket = self._connect(url)
        self.url = url

    def _connect(self, url: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._open_socket()
        socket.setsockopt(zmq.SNDHWM, self._high_water_mark)
        socket.connect(url)
        return socket

    def send(self, message: M, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Raises PipelineError when the queue is full, which credits rule out."""
        if not self.try_send(message, frames):
            raise PipelineError(f"the queue to {self.url} is full at {self._high_water_mark} messages")

    def try_send(self, message: M, frames: Sequence[bytes | memoryview] = ()) -> bool:
        """False when the queue is full. For messages that may be dropped, such as statistics."""
        if (data := self._encoder.encode(message)) is None:
            return True
        try:
            self._socket.send_multipart([data, *frames], zmq.NOBLOCK, copy=not frames)
        except zmq.Again:
            return False
        return True

    def reconnect(self, url: str) -> None:
        """Connects to the successor of a dead peer. Messages queued for the dead peer are dropped."""
        self._socket.close(linger=0)
        self._socket, self.url = self._connect(url), url

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)


class _Decoding(Generic[M]):
    def __init__(self, union: Any, is_authenticated: bool = False) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._is_authenticated = is_authenticated
        self.num_refused = 0

    def decode(self, parts: list[zmq.Frame]) -> Received[M] | None:
        if 1 <= len(parts) <= MAX_FRAMES:
            # Any exception here is the sender's fault: RecursionError for deep nesting, MemoryError,
            # RequestError of a struct that checks itself, and others that no list would be complete for.
            with contextlib.suppress(Exception):
                user = parts[0].get(USER_ID) if self._is_authenticated else ""
                message = self._decoder.decode(parts[0].buffer)
                return Received(message, [part.buffer for part in parts[1:]], str(user))
        self.num_refused += 1
        return None


class Receiver(Generic[M]):
    """PULL end of an edge, or SUB: `receive` never blocks."""

    def __init__(
        self, socket: zmq.Socket[bytes], union: Any, url: str, is_authenticated: bool = False
    ) -> None:
        self.socket, self.url = socket, url
        self._decoding = _Decoding[M](union, is_authenticated)
        self._has_topic = socket.type == zmq.SUB

    @property
    def num_refused(self) -> int:
        return self._decoding.num_refused

    def receive(self) -> Received[M] | None:
        """The next well-formed message; None when there is none, or after `MAX_GARBAGE` undecodable ones."""
        for _ in range(MAX_GARBAGE):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            if (received := self._decoding.decode(parts[self._has_topic :])) is not None:
                return received
        return None

    def close(self, linger_ms: int = 0) -> None:
        self.socket.close(linger=linger_ms)


class Relayed(Receiver[M]):
    """SUB whose topics change, for messages that are passed on undecoded."""

    def receive_raw(self) -> tuple[bytes, bytes] | None:
        """Topic and message, not decoded; None when there is none."""
        try:
            topic, data = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return topic, data

    def subscribe(self, topic: bytes) -> None:
        self.socket.setsockopt(zmq.SUBSCRIBE, topic)

    def unsubscribe(self, topic: bytes) -> None:
        self.socket.setsockopt(zmq.UNSUBSCRIBE, topic)

    def reconnect(self, url: str) -> None:
        """Connects to the successor of a dead publisher."""
        self.socket.disconnect(self.url)
        self.socket.connect(url)
        self.url = url


class AsyncReceiver(Generic[M]):
    """A `Receiver` for asyncio."""

    def __init__(self, socket: zmq.asyncio.Socket, union: Any, url: str) -> None:
        self.socket, self.url = socket, url
        self._decoding = _Decoding[M](union)
        self._has_topic = socket.type == zmq.SUB
        self._num_received = 0

    @property
    def num_refused(self) -> int:
        return self._decoding.num_refused

    def reconnect(self, url: str) -> None:
        """Connects a subscriber to the successor of a dead publisher."""
        self.socket.disconnect(self.url)
        self.socket.connect(url)
        self.url = url

    async def receive(self) -> Received[M]:
        """The next well-formed message. Yields to other tasks now and then, even if the queue is never empty:
        zmq's own receive does not yield while a message is queued."""
        while True:
            self._num_received += 1
            if self._num_received % MAX_GARBAGE == 0:
                await asyncio.sleep(0)
            parts = await self.socket.recv_multipart(copy=False)
            if (received := self._decoding.decode(parts[self._has_topic :])) is not None:
                return received

    def close(self, linger_ms: int = 0) -> None:
        self.socket.close(linger=linger_ms)


class Publisher(Generic[M]):
    """XPUB end of an edge. A subscriber gets exactly the topics that it asked for and `accepts` allows.

    `accepts` takes a topic and the subscriber's public key (empty on edges without authentication).
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        accepts: Callable[[bytes, str], bool],
        encoder: MessageEncoder | None = None,
        is_authenticated: bool = False,
    ) -> None:
        self.socket = socket
        self._accepts, self._is_authenticated = accepts, is_authenticated
        self._refused: Counter[bytes] = Counter()  # refused subscriptions that are not ended yet, by topic
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self.num_refused = 0

    def subscriptions(self, max_events: int = MAX_EVENTS) -> list[Subscription]:
        """Accepted subscriptions that began or ended since the last call. Reads at most `max_events` frames;
        a poller wakes again for the rest."""
        seen: list[Subscription] = []
        for _ in range(max_events):
            try:
                frame = self.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            event = frame.bytes
            if event[:1] not in (b"\0", b"\1"):
                continue
            topic, is_new = event[1:], event[0] == 1
            if is_new and not self._accepts(topic, str(frame.get(USER_ID)) if self._is_authenticated else ""):
                self.num_refused += 1
                self._refused[topic] += 1
                continue
            # ZeroMQ does not say whose subscription ends: a refused one must not end an accepted one
            if not is_new and self._refused[topic] > 0:
                self._refused[topic] -= 1
                self._refused += Counter()  # drops zeros
                continue
            self.socket.setsockopt(zmq.SUBSCRIBE if is_new else zmq.UNSUBSCRIBE, topic)
            seen.append(Subscription(topic, is_new))
        return seen

    def publish(self, message: M, topic: bytes = ALL) -> bool:
        """False if the queue of a subscriber of this topic is full. True, and lost, without subscribers."""
        data = self._encoder.encode(message)
        return data is None or self.publish_raw(data, topic)

    def publish_raw(self, data: bytes, topic: bytes) -> bool:
        """`publish` for an encoded message."""
        try:
            self.socket.send_multipart([topic, data], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self, linger_ms: int = 0) -> None:
        self.socket.close(linger=linger_ms)
