"""Reads by NIXL: this node reads the memory of another, which its carrier has registered, by itself.

A pool is read so only after the pattern behind it has arrived. A slot's generation only grows: one that is
still the handle's behind the read was the handle's all the time. NIXL opens ports of its own, in the clear.
Only pools on the host are registered: the way from GPU to GPU has never been run, and those go by messages.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipeline.transport.memory import HostMemory
from pipeline.transport.tensors import PATTERN_BYTES, PoolMap, TensorPool
from pipeline.wire.carrying import SharedPool
from pipeline.wire.handles import PoolInfo, TensorHandle
from workers.carrier.reads import Read

logger = logging.getLogger(__name__)
NUM_PLACES = 256  # of the scratch memory: patterns and generations that are under way
GENERATION = struct.Struct("<q")
PoolName = tuple[str, int]  # id and epoch


class AgentError(Exception):
    """NIXL refuses, or has lost the peer."""


class TransferState(enum.Enum):
    UNDER_WAY = "under way"
    DONE = "done"
    LOST = "lost"


class Agent(Protocol):
    """The calls of NIXL that reads need; tests use a fake. All of them may raise AgentError."""

    def register(self, address: int, nbytes: int) -> object: ...

    def deregister(self, registered: object) -> None: ...

    def metadata(self) -> bytes: ...

    def add_peer(self, metadata: bytes) -> str:
        """Learns, or learns anew, what a peer has registered. Returns its name."""

    def remove_peer(self, name: str) -> None: ...

    def read(self, peer: str, local: int, remote: int, nbytes: int) -> object: ...

    def state(self, transfer: object) -> TransferState: ...

    def release(self, transfer: object) -> None:
        """Ends a transfer, done or not: nothing is written any more."""


@dataclass(slots=True)
class _Peer:
    name: str
    pools: dict[PoolName, SharedPool]
    proven: set[PoolName] = field(default_factory=set)


class _Registered(NamedTuple):
    pool: SharedPool
    memory: object
    table: object


@dataclass(slots=True, eq=False)
class _Transfer:
    """A probe, or a read: first its data, then the generation of its slot."""

    node: int
    pool: SharedPool
    place: int  # in the scratch memory
    handle: object
    read: Read | None = None  # None: a probe
    is_checking: bool = False


class NixlTransport:
    """`own`: the pools into which this node reads; `mapped`: the pools of its workers. `end` is told of each
    read that has ended."""

    kind = "nixl"

    def __init__(
        self, agent: Agent, own: Iterable[TensorPool], mapped: PoolMap, end: Callable[[int, bool], None]
    ) -> None:  # fmt: skip
        self._agent, self._mapped, self._end = agent, mapped, end
        self._scratch = ctypes.create_string_buffer(NUM_PLACES * PATTERN_BYTES)
        self._places = list(range(NUM_PLACES))
        agent.register(ctypes.addressof(self._scratch), len(self._scratch))
        self._bases: dict[int, int] = {}  # of own pools, by id(): addresses
        for pool in own:
            assert isinstance(pool.memory, HostMemory)
            self._bases[id(pool)] = pool.memory.address
            agent.register(pool.memory.address, pool.info.nbytes)
        self._registered: dict[str, _Registered] = {}
        self._peers: dict[int, _Peer] = {}
        self._transfers: dict[int, _Transfer] = {}  # by number; probes have negative ones
        self._num_probes = 0

    # What others may read.

    def register(self, info: PoolInfo) -> bool:
        addresses = self._mapped.addresses(info.pool_id, info.epoch)
        if addresses is None:
            return False
        self.withdraw(info.pool_id, info.epoch)
        memory, table = addresses
        try:
            registered = [
                self._agent.register(memory, info.nbytes + PATTERN_BYTES),
                self._agent.register(table, GENERATION.size * info.max_slots),
            ]
        except AgentError as error:
            logger.warning("%s is not shared by nixl: %s", info.pool_id, error)
            return False
        pool = SharedPool(
            pool_id=info.pool_id, epoch=info.epoch, address=memory, nbytes=info.nbytes, table_address=table,
            max_slots=info.max_slots, pattern=info.pattern,
        )  # fmt: skip
        self._registered[info.pool_id] = _Registered(pool, *registered)
        return True

    def withdraw(self, pool_id: str, epoch: int) -> bool:
        known = self._registered.get(pool_id)
        if known is None or known.pool.epoch >= epoch:
            return False
        del self._registered[pool_id]
        try:
            self._agent.deregister(known.memory)
            self._agent.deregister(known.table)
        except AgentError as error:
            logger.warning("%s is still registered with nixl: %s", pool_id, error)
        return True

    def offer(self) -> tuple[bytes, tuple[SharedPool, ...]]:
        return self._agent.metadata(), tuple(one.pool for one in self._registered.values())

    # What this node may read.

    def on_offer(self, node: int, agent: bytes, pools: tuple[SharedPool, ...]) -> None:
        try:
            name = self._agent.add_peer(agent)
        except AgentError as error:
            logger.warning("node %d cannot be reached by nixl: %s", node, error)
            self.forget_node(node)
            return
        known = {(pool.pool_id, pool.epoch): pool for pool in pools}
        before = self._peers.get(node)
        proven = set() if before is None or before.name != name else before.proven & set(known)
        self._peers[node] = _Peer(name, known, proven)
        for pool_name in known.keys() - proven:
            self._probe(node, known[pool_name])

    def _probe(self, node: int, pool: SharedPool) -> None:
        """Reads the pattern behind a pool."""
        self._num_probes += 1
        place = self._places.pop()
        transfer = _Transfer(node, pool, place, None)
        self._transfers[-self._num_probes] = transfer
        self._post(-self._num_probes, self._address(place), pool.address + pool.nbytes, len(pool.pattern))

    def _address(self, place: int) -> int:
        """In the scratch memory, which is cleared: bytes that do not arrive must not look as if they had."""
        address = ctypes.addressof(self._scratch) + place * PATTERN_BYTES
        ctypes.memset(address, 0, PATTERN_BYTES)
        return address

    def forget_node(self, node: int) -> None:
        for number in [number for number, one in self._transfers.items() if one.node == node and number < 0]:
            self.forget(number)
        if (peer := self._peers.pop(node, None)) is not None:
            self._remove(peer)

    def _remove(self, peer: _Peer) -> None:
        try:
            self._agent.remove_peer(peer.name)
        except AgentError as error:
            logger.debug("%s was gone already: %s", peer.name, error)

    def can_read(self, node: int, source: TensorHandle) -> bool:
        peer = self._peers.get(node)
        return peer is not None and (source.pool_id, source.epoch) in peer.proven

    def is_proven(self, node: int) -> bool:
        peer = self._peers.get(node)
        return peer is not None and bool(peer.proven)

    # Reads.

    def begin(self, number: int, read: Read) -> None:
        source, peer = read.source, self._peers[read.node]
        pool = peer.pools[source.pool_id, source.epoch]
        transfer = self._transfers[number] = _Transfer(read.node, pool, self._places.pop(), None, read)
        is_inside = (
            0 <= source.offset <= source.offset + source.nbytes <= pool.nbytes
            and 0 <= source.slot < pool.max_slots
        )
        if is_inside:
            local = self._bases[id(read.pool)] + read.target.offset
            self._post(number, local, pool.address + source.offset, source.nbytes)
        else:
            transfer.handle = None  # ended by `poll`

    def _post(self, number: int, local: int, remote: int, nbytes: int) -> None:
        """A transfer that cannot begin has no handle: `poll` ends it."""
        transfer = self._transfers[number]
        peer = self._peers.get(transfer.node)
        transfer.handle = None
        if peer is None:
            return
        try:
            transfer.handle = self._agent.read(peer.name, local, remote, nbytes)
        except AgentError as error:
            logger.warning("nothing comes from node %d by nixl: %s", transfer.node, error)

    def forget(self, number: int) -> None:
        if (transfer := self._transfers.pop(number, None)) is not None:
            self._release(transfer)
            self._places.append(transfer.place)

    def _release(self, transfer: _Transfer) -> None:
        if transfer.handle is None:
            return
        try:
            self._agent.release(transfer.handle)
        except AgentError:
            # it cannot be cancelled: without its peer nothing is written
            if (peer := self._peers.pop(transfer.node, None)) is not None:
                self._remove(peer)

    def poll(self) -> bool:
        has_moved = False
        for number, transfer in list(self._transfers.items()):
            state = self._state(transfer)
            if state is TransferState.UNDER_WAY or number not in self._transfers:
                continue
            has_moved = True
            self._release(transfer)
            transfer.handle = None
            if state is TransferState.DONE:
                self._on_done(number, transfer)
            else:
                self._distrust(transfer.node)
                self._finish(number, transfer, False)
        return has_moved

    def _distrust(self, node: int) -> None:
        """A transfer was lost: what follows comes by messages, until the node shares its memory anew."""
        if (peer := self._peers.get(node)) is not None and peer.proven:
            logger.warning("a transfer from node %d by nixl was lost", node)
            peer.proven.clear()

    def _state(self, transfer: _Transfer) -> TransferState:
        if transfer.handle is None:
            return TransferState.LOST
        try:
            return self._agent.state(transfer.handle)
        except AgentError:
            return TransferState.LOST

    def _on_done(self, number: int, transfer: _Transfer) -> None:
        pool, start = transfer.pool, transfer.place * PATTERN_BYTES
        read = transfer.read
        if read is None:
            found = ctypes.string_at(ctypes.addressof(self._scratch) + start, len(pool.pattern))
            self._finish(number, transfer, found == pool.pattern)
        elif transfer.is_checking:
            (generation,) = GENERATION.unpack_from(self._scratch, start)
            self._finish(number, transfer, generation == read.source.generation)
        else:
            transfer.is_checking = True
            read.num_read = read.source.nbytes
            remote = pool.table_address + GENERATION.size * read.source.slot
            self._post(number, self._address(transfer.place), remote, GENERATION.size)

    def _finish(self, number: int, transfer: _Transfer, is_good: bool) -> None:
        del self._transfers[number]
        self._places.append(transfer.place)
        if transfer.read is not None:
            self._end(number, is_good)
            return
        pool, peer = transfer.pool, self._peers.get(transfer.node)
        if is_good and peer is not None and (pool.pool_id, pool.epoch) in peer.pools:
            peer.proven.add((pool.pool_id, pool.epoch))
        elif not is_good:
            logger.warning(
                "what %s of node %d has in its memory does not arrive by nixl: it comes by messages",
                pool.pool_id, transfer.node,
            )  # fmt: skip

    @property
    def is_busy(self) -> bool:
        return bool(self._transfers)
