"""Decides which messages the gateway relays, and for which keys. Pure: sockets are arguments."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from pipeline.transport.ends import Subscription
from pipeline.transport.keys import owner_of
from pipeline.wire.clients import CLIENT_ID_BYTES, MAX_SALT_BYTES, Hello, IngestMessage, SubmitRequest

logger = logging.getLogger(__name__)
MAX_CLIENTS_PER_KEY = 256
MESSAGES_PER_S = 500.0  # of one key
MAX_BURST = 4096.0  # messages: a submission and an abort for each request that may be open by default
COUNTED = {
    "relayed_messages": "Messages of clients that were passed on",
    "refused_client_ids": "Messages under a client id that the key does not own, dropped",
    "clients_cut_off": "Clients that lagged too far behind",
    "dropped_messages": "Messages beyond a key's rate, dropped",
}


class TokenBucket:
    """Allows `burst` events at once, `rate` per second in the long run. Times are of a steady clock."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._then = burst, now

    def take(self, now: float) -> bool:
        self._level = min(self._burst, self._level + (now - self._then) * self._rate)
        self._then = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Upstream(Protocol):
    """The outputs of one LLM rank."""

    def subscribe(self, topic: bytes) -> None: ...

    def unsubscribe(self, topic: bytes) -> None: ...


class Gateway:
    """`publish` takes an encoded message and a client's id, and returns False if that client's queue is full.

    `name_of` gives the name of a public key; None for an unknown or removed key.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        publish: Callable[[bytes, bytes], bool],
        name_of: Callable[[str], str | None],
    ) -> None:
        self._upstreams, self._publish, self._name_of = upstreams, publish, name_of
        self._tenants: dict[str, str] = {}  # by public key; bounded by the number of key files ever
        self._buckets: dict[str, TokenBucket] = {}  # likewise
        # 2 for a client that has reconnected before its old connection has timed out.
        self._num_connections: Counter[bytes] = Counter()
        self._cut_off: set[bytes] = set()
        self.counters = dict.fromkeys(COUNTED, 0)
        self.num_bytes = 0  # of media from clients, and of outputs to them

    @property
    def num_clients(self) -> int:
        return len(self._num_connections)

    def accepts(self, topic: bytes, user: str) -> bool:
        """Whether the holder of this key may subscribe to this client id."""
        owner = owner_of(user)
        if len(topic) != CLIENT_ID_BYTES or not topic.startswith(owner):
            return False
        return (
            topic in self._num_connections
            or sum(known.startswith(owner) for known in self._num_connections) < MAX_CLIENTS_PER_KEY
        )

    def on_subscriptions(self, events: Iterable[Subscription]) -> None:
        for client_id, is_new in events:
            was_here = client_id in self._num_connections
            self._num_connections[client_id] += 1 if is_new else -1
            if is_new and not was_here:
                self._listen(client_id)
            elif self._num_connections[client_id] <= 0:
                del self._num_connections[client_id]
                if client_id in self._cut_off:
                    self._cut_off.remove(client_id)
                elif was_here:
                    self._stop_listening(client_id)

    def _listen(self, client_id: bytes) -> None:
        for upstream in self._upstreams:
            upstream.subscribe(client_id)

    def _stop_listening(self, client_id: bytes) -> None:
        """For the LLM this client has left: it ends the client's requests."""
        for upstream in self._upstreams:
            upstream.unsubscribe(client_id)

    def is_in_time(self, user: str, now: float) -> bool:
        """Whether a key may send one more message. The client library repeats dropped messages."""
        if (bucket := self._buckets.get(user)) is None:
            bucket = self._buckets[user] = TokenBucket(MESSAGES_PER_S, MAX_BURST, now)
        if bucket.take(now):
            return True
        self.counters["dropped_messages"] += 1
        return False

    def is_relayed(self, message: IngestMessage, user: str) -> bool:
        """Whether this message is relayed to the pipeline. A client that was cut off must first send
        `Hello`."""
        if len(message.client_id) != CLIENT_ID_BYTES or not message.client_id.startswith(owner_of(user)):
            self.counters["refused_client_ids"] += 1
            return False
        if message.client_id in self._cut_off:
            if not isinstance(message, Hello):
                return False
            self._cut_off.remove(message.client_id)
            self._listen(message.client_id)
        self.counters["relayed_messages"] += 1
        return True

    def stamped(self, message: IngestMessage, user: str) -> IngestMessage:
        """The message with the tenant of its key, whatever the client wrote there.

        The key is also part of the salt, so that caches, and the names that clients give to content, are
        separate for each key.
        """
        if not isinstance(message, SubmitRequest):
            return message
        salt = message.cache_salt
        if len(salt) <= MAX_SALT_BYTES:  # preprocess refuses a longer one
            salt = hashlib.sha256(b"curve:" + user.encode() + b"\0" + salt).digest()
        return msgspec.structs.replace(message, tenant=self._tenant(user), cache_salt=salt)

    def _tenant(self, user: str) -> str:
        """`curve:NAME`, after the present name of the key's file. A key whose file is removed keeps its name
        until its connections end."""
        if name := self._name_of(user):
            self._tenants[user] = f"curve:{name}"
        return self._tenants.setdefault(user, f"curve:{owner_of(user).hex()}")

    def on_output(self, client_id: bytes, data: bytes) -> None:
        """Relays a message of the LLM. A client whose queue is full is cut off; it queries its requests when
        it reads again."""
        if client_id in self._cut_off:
            return
        if self._publish(data, client_id):
            self.num_bytes += len(data)
            return
        logger.warning("a client does not read its outputs: cut off")
        self._cut_off.add(client_id)
        self._stop_listening(client_id)
        self.counters["clients_cut_off"] += 1
