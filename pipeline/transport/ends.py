"""The ends of edges: typed senders, receivers and publishers over ZeroMQ sockets.

No send blocks. PUSH/PULL edges are bounded by credits far below the high-water mark: a full queue there is an
error of the pipeline. PUB/SUB edges use XPUB with NODROP, so that a full queue is reported; `control` alone
drops messages for a subscriber that does not read, since the next heartbeat repeats them. A message that
cannot be decoded is refused and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
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
    """PUSH end of an edge to one peer. Messages queue until the peer is connected.

    A peer on another node has no address until it runs. Messages wait for one that is being started; those
    for a node that has not joined are dropped, and so are those that are queued for a peer that dies.
    """

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
        self._waiting: deque[list[bytes | memoryview]] | None = None  # for the address of a peer that starts
        self.url = url

    def _connect(self, url: str) -> zmq.Socket[bytes] | None:
        if not url:
            return None
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
        if self.drops:
            return True
        if (data := self._encoder.encode(message)) is None:
            return True
        if self._socket is None:
            assert self._waiting is not None
            self._waiting.append([data, *map(bytes, frames)])
            return True
        try:
            self._socket.send_multipart([data, *frames], zmq.NOBLOCK, copy=not frames)
        except zmq.Again:
            return False
        return True

    @property
    def drops(self) -> bool:
        """Whether messages are dropped for lack of an address."""
        return self._socket is None and self._waiting is None

    def reconnect(self, url: str, is_starting: bool = False, has_died: bool = True) -> None:
        """Connects to the successor of a dead peer. Messages queued for the dead peer are dropped.

        `is_starting`: the successor has no address yet, but will have one. `has_died`: else what waits is for
        the peer that has its address now.
        """
        self.close()
        self._socket, self.url = self._connect(url), url
        waiting = self._waiting if self._waiting is not None and not has_died else deque()
        if self._socket is not None:
            for parts in waiting:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
        self._waiting = waiting if is_starting and self._socket is None else None

    def close(self, linger_ms: int = 0) -> None:
        if self._socket is not None:
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
        self,
        socket: zmq.Socket[bytes],
        union: Any,
        url: str,
        is_authenticated: bool = False,
        door: zmq.Socket[bytes] | None = None,
    ) -> None:
        """`door`: the same edge for the workers of other nodes."""
        self.socket, self.url = socket, url
        self.sockets = [socket] if door is None else [socket, door]
        self._decoding = _Decoding[M](union, is_authenticated)
        self._has_topic = socket.type == zmq.SUB

    @property
    def num_refused(self) -> int:
        return self._decoding.num_refused

    def receive(self) -> Received[M] | None:
        """The next well-formed message; None when there is none, or after `MAX_GARBAGE` undecodable ones."""
        for _ in range(MAX_GARBAGE):
            if (parts := self._next_parts()) is None:
                return None
            if (received := self._decoding.decode(parts[self._has_topic :])) is not None:
                return received
        return None

    def _next_parts(self) -> list[zmq.Frame] | None:
        """Of several sockets the one that gave a message waits until the others have been asked."""
        for number, socket in enumerate(self.sockets):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
            if len(self.sockets) > 1:
                self.sockets.append(self.sockets.pop(number))
            return parts
        return None

    def close(self, linger_ms: int = 0) -> None:
        for socket in self.sockets:
            socket.close(linger=linger_ms)


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
        _reconnect(self.socket, self.url, url)
        self.url = url


def _reconnect(socket: Any, old: str, new: str) -> None:
    """A publisher on another node that does not run has no address."""
    if old:
        socket.disconnect(old)
    if new:
        socket.connect(new)


class AsyncReceiver(Generic[M]):
    """A `Receiver` for asyncio."""

    def __init__(
        self, socket: zmq.asyncio.Socket, union: Any, url: str, door: zmq.asyncio.Socket | None = None
    ) -> None:
        """`door`: the same edge for the workers of other nodes."""
        self.socket, self.url, self._door = socket, url, door
        self._decoding = _Decoding[M](union)
        self._has_topic = socket.type == zmq.SUB
        self._num_received = 0
        self._pending: dict[zmq.asyncio.Socket, asyncio.Future[list[zmq.Frame]]] = {}  # where there is a door

    @property
    def num_refused(self) -> int:
        return self._decoding.num_refused

    def reconnect(self, url: str) -> None:
        """Connects a subscriber to the successor of a dead publisher."""
        _reconnect(self.socket, self.url, url)
        self.url = url

    async def receive(self) -> Received[M]:
        """The next well-formed message. Yields to other tasks now and then, even if the queue is never empty:
        zmq's own receive does not yield while a message is queued."""
        while True:
            self._num_received += 1
            if self._num_received % MAX_GARBAGE == 0:
                await asyncio.sleep(0)
            parts = await self._next_parts()
            if (received := self._decoding.decode(parts[self._has_topic :])) is not None:
                return received

    async def _next_parts(self) -> list[zmq.Frame]:
        if self._door is None:
            parts: list[zmq.Frame] = await self.socket.recv_multipart(copy=False)
            return parts
        while True:
            for socket in (self.socket, self._door):
                if socket not in self._pending:
                    # a future that is kept: a cancelled receive must lose no message
                    self._pending[socket] = asyncio.ensure_future(socket.recv_multipart(copy=False))
            await asyncio.wait(self._pending.values(), return_when=asyncio.FIRST_COMPLETED)
            done = next(socket for socket, future in self._pending.items() if future.done())
            # A socket with CURVE may count as readable during a handshake.
            with contextlib.suppress(zmq.Again):
                return self._pending.pop(done).result()

    def close(self, linger_ms: int = 0) -> None:
        for socket in (self.socket, self._door):
            if socket is not None:
                socket.close(linger=linger_ms)


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
        door: zmq.Socket[bytes] | None = None,
    ) -> None:
        """`door`: the same edge for the workers of other nodes."""
        self.sockets = [socket] if door is None else [socket, door]
        self._accepts, self._is_authenticated = accepts, is_authenticated
        # Refused subscriptions that are not ended yet, by the socket and the topic.
        self._refused: Counter[tuple[int, bytes]] = Counter()
        self._encoder = encoder or msgspec.msgpack.Encoder()
        self.num_refused = 0

    def subscriptions(self, max_events: int = MAX_EVENTS) -> list[Subscription]:
        """Accepted subscriptions that began or ended since the last call. Reads at most `max_events` frames;
        a poller wakes again for the rest."""
        seen: list[Subscription] = []
        for socket in self.sockets:
            self._read(socket, max_events, seen)
        return seen

    def _read(self, socket: zmq.Socket[bytes], max_events: int, seen: list[Subscription]) -> None:
        for _ in range(max_events):
            try:
                frame = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            event = frame.bytes
            if event[:1] not in (b"\0", b"\1"):
                continue
            topic, is_new = event[1:], event[0] == 1
            place = socket.fileno(), topic
            if is_new and not self._accepts(topic, str(frame.get(USER_ID)) if self._is_authenticated else ""):
                self.num_refused += 1
                self._refused[place] += 1
                continue
            # ZeroMQ does not say whose subscription ends: a refused one must not end an accepted one
            if not is_new and self._refused[place] > 0:
                self._refused[place] -= 1
                self._refused += Counter()  # drops zeros
                continue
            socket.setsockopt(zmq.SUBSCRIBE if is_new else zmq.UNSUBSCRIBE, topic)
            seen.append(Subscription(topic, is_new))

    def publish(self, message: M, topic: bytes = ALL) -> bool:
        """False if the queue of a subscriber of this topic is full. True, and lost, without subscribers."""
        data = self._encoder.encode(message)
        return data is None or self.publish_raw(data, topic)

    def publish_raw(self, data: bytes, topic: bytes) -> bool:
        """`publish` for an encoded message."""
        has_room = True
        for socket in self.sockets:
            try:
                socket.send_multipart([topic, data], zmq.NOBLOCK)
            except zmq.Again:
                has_room = False
        return has_room

    def close(self, linger_ms: int = 0) -> None:
        for socket in self.sockets:
            socket.close(linger=linger_ms)
