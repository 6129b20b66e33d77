"""Which transport reads which pool: messages, or NIXL where both nodes have it and its probe has arrived."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pipeline.transport.ends import Sink
from pipeline.wire.base import Origin
from pipeline.wire.carrying import CarryMessage, MemoryShared
from pipeline.wire.handles import PoolInfo, TensorHandle
from workers.carrier.reads import Transport
from workers.carrier.sharing import SharingTransport

logger = logging.getLogger(__name__)


class Transports:
    """`peers`: the sinks to the carriers of other nodes; `shared`: None where memory is not shared."""

    def __init__(
        self, origin: Origin, peers: Mapping[int, Sink[CarryMessage]], by_message: Transport,
        shared: SharingTransport | None,
    ) -> None:  # fmt: skip
        self._origin, self._peers, self._by_message, self._shared = origin, peers, by_message, shared
        self.kinds: dict[int, str] = dict.fromkeys(peers, by_message.kind)  # by node

    def choose(self, node: int, source: TensorHandle) -> Transport:
        if self._shared is not None and self._shared.can_read(node, source):
            return self._shared
        return self._by_message

    def start(self) -> None:
        """Tells all peers what they may read."""
        for node in self._peers:
            self._share_with(node)

    def _share_with(self, node: int) -> None:
        if self._shared is not None:
            agent, pools = self._shared.offer()
            self._peers[node].send(MemoryShared(agent=agent, pools=pools, **self._origin))

    def share(self, info: PoolInfo) -> None:
        """A pool of this node is mapped."""
        if self._shared is not None and self._shared.register(info):
            self.start()

    def withdraw(self, pool_id: str, epoch: int) -> None:
        """The owner of a pool has died; `epoch` is its successor's. To be called before it is unmapped."""
        if self._shared is not None and self._shared.withdraw(pool_id, epoch):
            self.start()

    def on_shared(self, message: MemoryShared) -> None:
        """A peer shares its memory: reads the pattern behind each new pool, and decides by what arrives."""
        if self._shared is None:
            return
        node = message.sender.rank
        self._shared.on_offer(node, message.agent, message.pools)
        self._tell(node)

    def _tell(self, node: int) -> None:
        shared = self._shared
        kind = shared.kind if shared is not None and shared.is_proven(node) else self._by_message.kind
        if kind != self.kinds[node]:
            self.kinds[node] = kind
            logger.info("tensors of node %d come by %s", node, kind)

    def on_death(self, node: int) -> None:
        """The carrier of a node has died: its successor shares its own memory, and is told of ours."""
        if self._shared is not None and node in self._peers:
            self._shared.forget_node(node)
            self._tell(node)
            self._share_with(node)

    def poll(self) -> bool:
        """Ends the reads that are done. Whether there were any, or probes."""
        if self._shared is None:
            return False
        has_moved = self._shared.poll()
        if has_moved:
            for node in self._peers:
                self._tell(node)
        return has_moved

    @property
    def is_busy(self) -> bool:
        """Whether `poll` is to be called again soon."""
        return self._shared is not None and self._shared.is_busy
