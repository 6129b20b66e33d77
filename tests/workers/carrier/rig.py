"""A carrier's core between sinks that only keep what they are sent. Its reads are ended by hand."""

from __future__ import annotations

from pipeline.transport.slots import ALIGNMENT, SlotAllocator
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.base import ChunkKey, GridTHW, Order, PoolOpened, WorkerMessage
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import CancelEncode, EncodeMiss, EncodeRequest, PixelsReleased
from pipeline.wire.generation import EmbeddingReady
from pipeline.wire.handles import PoolInfo, TensorHandle
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, PREPROCESS, FakeSink
from workers.carrier.core import CarrierCore, Parts
from workers.carrier.embeddings import EmbeddingCopies
from workers.carrier.pixels import PixelCopies
from workers.carrier.reads import Read, Reads
from workers.carrier.source import PieceSource
from workers.carrier.transports import Transports

NODE = 1  # of the carrier; preprocess is on node 0, the ViTs 0 and 1 on nodes 0 and 1, the lead on node 1
CARRIER = WorkerId(Role.CARRIER, NODE)
HEAD_CARRIER = WorkerId(Role.CARRIER, 0)
FAR_VIT, VIT = WorkerId(Role.VIT, 0), WorkerId(Role.VIT, 1)
NODE_OF = {PREPROCESS: 0, FAR_VIT: 0, HEAD_CARRIER: 0}
INFO = PoolInfo("", 1, "host", 1, 1, 1, 1, b"")
NUM_BYTES = ALIGNMENT


class FakeTransport:
    kind = "fake"

    def __init__(self) -> None:
        self.begun: dict[int, Read] = {}

    def begin(self, number: int, read: Read) -> None:
        self.begun[number] = read

    def forget(self, number: int) -> None:
        del self.begun[number]


class Rig:
    """`room`: for how many chunks each of the two pools has room, the reserve for one of them."""

    def __init__(self, room: int = 4) -> None:
        self.epochs = dict.fromkeys((PREPROCESS, FAR_VIT, VIT, LLM_0, CARRIER, HEAD_CARRIER), 1)
        self.vit, self.llm, self.far_vit, self.feedback, self.peer = (FakeSink() for _ in range(5))
        self.transport = FakeTransport()
        origin = {"sender": CARRIER, "epoch": 1}
        transports = Transports(origin, {0: self.peer}, self.transport, None)  # type: ignore[arg-type]
        self.reads = Reads(transports.choose, lambda: 0.0)
        self.pools: list[TensorPool] = []
        self.pixels = PixelCopies(
            origin, *self._pool(room), {VIT.rank: self.vit}, self.feedback, self.reads  # type: ignore[arg-type]
        )  # fmt: skip
        self.embeddings = EmbeddingCopies(
            origin, *self._pool(room), {0: self.llm}, {FAR_VIT: self.far_vit}, self.reads,  # type: ignore[arg-type]
            self.epoch_of, lambda worker: NODE_OF.get(worker, NODE),
        )  # fmt: skip
        source = PieceSource(origin, PoolMap(), {0: self.peer}, self.epoch_of)  # type: ignore[arg-type]
        self.core = CarrierCore(
            self.epoch_of,
            Parts(
                reads=self.reads, source=source, transports=transports, pixels=self.pixels,
                embeddings=self.embeddings,
            ),
            [VIT.rank], [0],
        )  # fmt: skip
        self.core.start()
        self.core.on_encode(VIT.rank, opened(PREPROCESS))
        self.core.on_llm(0, opened(FAR_VIT))
        for sink in (self.vit, self.llm):
            sink.take(PoolOpened)

    def _pool(self, room: int) -> tuple[TensorPool, SlotAllocator]:
        pool = TensorPool.on_host(str(CARRIER), 1, room * NUM_BYTES, 64)
        self.pools.append(pool)
        return pool, SlotAllocator(room * NUM_BYTES, NUM_BYTES, 64)

    def epoch_of(self, worker: WorkerId) -> int:
        return self.epochs[worker]

    def close(self) -> None:
        self.core.check_integrity()
        for pool in self.pools:
            pool.close()

    # What others do.

    def end(self, is_there: bool = True) -> None:
        """The oldest read ends."""
        number = next(iter(self.transport.begun))
        del self.transport.begun[number]
        self.reads.end(number, is_there)

    def die(self, worker: WorkerId) -> None:
        self.epochs[worker] += 1
        self.core.on_death(WorkerState(worker, self.epochs[worker], is_ready=False))

    def encode(self, key: ChunkKey, arrival: int = 1, with_pixels: bool = False, epoch: int = 1) -> None:
        pixels = handle(PREPROCESS, key.item) if with_pixels else None
        self.core.on_encode(VIT.rank, encode_request(key, arrival, pixels, epoch))

    def cancel(self, *keys: ChunkKey) -> None:
        self.core.on_encode(VIT.rank, CancelEncode(sender=PREPROCESS, epoch=1, keys=keys))

    def release(self, key: ChunkKey) -> None:
        self.core.on_carry(PixelsReleased(sender=VIT, epoch=self.epochs[VIT], key=key))

    def miss(self, key: ChunkKey) -> None:
        self.core.on_carry(EncodeMiss(sender=VIT, epoch=self.epochs[VIT], key=key))

    def ready(self, key: ChunkKey, lease_id: int, arrival: int | None = 1, slot: int | None = None) -> None:
        """The far ViT has an embedding for the lead."""
        embeddings = handle(FAR_VIT, lease_id if slot is None else slot, self.epochs[FAR_VIT])
        order = None if arrival is None else Order(arrival, key.item)
        message = EmbeddingReady(
            sender=FAR_VIT, epoch=self.epochs[FAR_VIT], key=key, lease_id=lease_id, embeddings=embeddings,
            was_encoded=True, sent_at=123.0, order=order,
        )  # fmt: skip
        self.core.on_llm(0, message)


def opened(sender: WorkerId, receiver_epoch: int = 1, epoch: int = 1) -> PoolOpened:
    return PoolOpened(sender=sender, epoch=epoch, pool=INFO, receiver_epoch=receiver_epoch)


def encode_request(
    key: ChunkKey, arrival: int, pixels: TensorHandle | None = None, epoch: int = 1
) -> EncodeRequest:
    return EncodeRequest(
        sender=PREPROCESS, epoch=epoch, key=key, arrival=arrival, position=key.item, mm_hash=b"h",
        grid_thw=GridTHW(1, 4, 4), pixels=pixels, will_follow=pixels is None, sent_at=9.0,
    )  # fmt: skip


def handle(owner: WorkerId, slot: int, epoch: int = 1) -> TensorHandle:
    return TensorHandle(str(owner), epoch, slot, 1, slot * NUM_BYTES, (NUM_BYTES // 4, 4), "uint8")


def key(request_id: str, item: int = 0, attempt: int = 1) -> ChunkKey:
    return ChunkKey(request_id, attempt, item, 0)


def kinds(messages: list[WorkerMessage]) -> list[str]:
    return [type(message).__name__ for message in messages]
