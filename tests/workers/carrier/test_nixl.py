"""Reads of another node's memory, with an agent that copies within this process."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator

import pytest

from pipeline.transport.slots import SlotAllocator
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.carrying import SharedPool
from pipeline.wire.handles import TensorHandle
from workers.carrier.nixl import AgentError, NixlTransport, TransferState
from workers.carrier.reads import Read, Reads
from workers.carrier.transports import Transports

NBYTES = 1 << 16
SHAPE = (10, 100)


class FakeAgent:
    """Transfers begin under way, and are done at the second look."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []
        self.removed: list[str] = []
        self.released = 0
        self.is_broken = self.brings_nothing = False
        self.is_lost = False

    def register(self, address: int, nbytes: int) -> object:
        self.registered.append((address, nbytes))
        return address, nbytes

    def deregister(self, registered: object) -> None:
        self.registered.remove(registered)  # type: ignore[arg-type]

    def metadata(self) -> bytes:
        return b"metadata"

    def add_peer(self, metadata: bytes) -> str:
        if self.is_broken:
            raise AgentError("no")
        return metadata.decode()

    def remove_peer(self, name: str) -> None:
        self.removed.append(name)

    def read(self, peer: str, local: int, remote: int, nbytes: int) -> object:
        if self.is_broken:
            raise AgentError("disconnected")
        return [local, remote, nbytes, 0]

    def state(self, transfer: object) -> TransferState:
        assert isinstance(transfer, list)
        local, remote, nbytes, looks = transfer
        transfer[3] = looks + 1
        if not looks:
            return TransferState.UNDER_WAY
        if self.is_lost:
            return TransferState.LOST
        if not self.brings_nothing:
            ctypes.memmove(local, remote, nbytes)
        return TransferState.DONE

    def release(self, transfer: object) -> None:
        self.released += 1


class FakeMessages:
    kind = "zeromq"

    def __init__(self) -> None:
        self.begun: list[int] = []

    def begin(self, number: int, read: Read) -> None:
        self.begun.append(number)

    def forget(self, number: int) -> None: ...


class Pair:
    """The pool of a ViT of node 0, its carrier's transport, and this node's, which reads."""

    def __init__(self) -> None:
        self.pool, self.allocator = make_pool("vit.0")
        self.own, self.room = make_pool("carrier.1")
        self.mapped = PoolMap()
        self.mapped.open(self.pool.info)
        self.theirs, self.agent = FakeAgent(), FakeAgent()
        self.source = NixlTransport(self.theirs, (), self.mapped, lambda number, is_there: None)
        self.messages = FakeMessages()
        self.reads = Reads(lambda node, handle: self.transports.choose(node, handle), lambda: 0.0)
        self.reader = NixlTransport(self.agent, (self.own,), PoolMap(), self.reads.end)
        self.transports = Transports({}, {0: None}, self.messages, self.reader)  # type: ignore[arg-type, typeddict-item, dict-item]
        self.ended: list[bool] = []

    def share(self, *changed: SharedPool) -> None:
        assert self.source.register(self.pool.info)
        metadata, pools = self.source.offer()
        self.reader.on_offer(0, metadata, changed or pools)

    def settle(self) -> None:
        while self.reader.is_busy:
            self.transports.poll()

    def read(self, source: TensorHandle) -> TensorHandle:
        slot = self.room.allocate(source.nbytes)
        assert slot is not None
        target = self.own.lend(slot, source.shape, source.dtype)
        self.reads.begin(Read(0, source, self.own, target, self.ended.append))
        return target

    def lend(self) -> TensorHandle:
        slot = self.allocator.allocate(1000)
        assert slot is not None
        handle = self.pool.lend(slot, SHAPE, "uint8")
        self.pool.write(handle, 0, bytes(range(250)) * 4)
        return handle

    def close(self) -> None:
        self.mapped.close("vit.0")
        self.pool.close()
        self.own.close()


def make_pool(name: str) -> tuple[TensorPool, SlotAllocator]:
    return TensorPool.on_host(name, 1, NBYTES, 8), SlotAllocator(NBYTES, NBYTES // 4, 8)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_a_pool_whose_pattern_arrives_is_read_and_said_so(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handle = pair.lend()
    pair.share()
    assert not pair.reader.can_read(0, handle), "not before the probe"
    pair.settle()
    assert pair.transports.kinds == {0: "nixl"}
    assert "tensors of node 0 come by nixl" in caplog.text
    target = pair.read(handle)
    pair.settle()
    assert pair.ended == [True]
    assert pair.own.array(target).tobytes() == bytes(range(250)) * 4
    assert (pair.reads.num_copies["nixl"], pair.messages.begun) == (1, [])


@pytest.mark.parametrize("fault", ["brings_nothing", "is_lost", "is_broken"])
def test_a_probe_that_does_not_arrive_leaves_it_to_messages(
    pair: Pair, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(pair.agent, fault, True)
    pair.share()
    pair.settle()
    assert pair.transports.kinds == {0: "zeromq"}
    assert "nixl" in caplog.text
    pair.read(pair.lend())
    assert len(pair.messages.begun) == 1


def test_a_slot_that_is_lent_again_while_it_is_read_is_stale(pair: Pair) -> None:
    pair.share()
    pair.settle()
    handle = pair.lend()
    pair.read(handle)
    for slot in list(pair.allocator._used.values()):
        pair.allocator.free(slot)
    pair.lend()
    pair.settle()
    assert pair.ended == [False]
    assert pair.reader.can_read(0, handle), "the way is good"


@pytest.mark.parametrize("wrong", [{"offset": NBYTES}, {"offset": -1}, {"slot": 8}, {"slot": -1}])
def test_nothing_outside_the_pool_is_read(pair: Pair, wrong: dict[str, int]) -> None:
    pair.share()
    pair.settle()
    handle = pair.lend()
    fields = {name: getattr(handle, name) for name in handle.__struct_fields__}
    pair.read(TensorHandle(**{**fields, **wrong}))
    pair.settle()
    assert pair.ended == [False]


def test_a_lost_transfer_is_said_and_what_follows_comes_by_messages(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.share()
    pair.settle()
    pair.agent.is_lost = True
    pair.read(pair.lend())
    pair.settle()
    assert pair.ended == [False]
    assert "was lost" in caplog.text
    assert pair.transports.kinds == {0: "zeromq"}
    pair.agent.is_lost = False
    pair.share()
    pair.settle()
    assert pair.transports.kinds == {0: "nixl"}, "it is proven anew"


def test_a_dead_node_and_a_dead_pool_are_forgotten(pair: Pair) -> None:
    pair.share()
    pair.settle()
    handle = pair.lend()
    pair.read(handle)
    pair.reader.forget_node(0)
    pair.reads.give_up(0)
    assert (pair.ended, pair.agent.removed, pair.reader.is_busy) == ([False], ["metadata"], False)
    num_registered = len(pair.theirs.registered)
    assert not pair.source.withdraw("vit.0", 1), "it lives"
    assert pair.source.withdraw("vit.0", 2)
    assert len(pair.theirs.registered) == num_registered - 2
    assert pair.source.offer()[1] == ()
