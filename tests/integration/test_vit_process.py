"""One real ViT process; the test plays the launcher, preprocess and rank 0 on real sockets."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config, ModelConfig, PreprocessConfig, VitConfig
from pipeline.families import read_model_info
from pipeline.process.fork_server import ForkServer
from pipeline.process.process import Placement, WorkerSpec
from pipeline.transport.poller import Poller
from pipeline.transport.slots import SlotAllocator
from pipeline.transport.sockets import Sockets
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.base import ChunkKey, GridTHW, PoolOpened
from pipeline.wire.control import PipelineState, WorkerFailed, WorkerReady, WorkerStats
from pipeline.wire.encoding import EncodeMiss, EncodeRequest, LeaseReleased, LeaseSet, PixelsReleased
from pipeline.wire.generation import EmbeddingReady, EncodeFailed
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import CONTROL, ENCODE, FEEDBACK, LLM, STATUS
from tests.checkpoints import make_checkpoint
from tests.fakes import LLM_0, PREPROCESS, VIT_0

EPOCH = 3  # of all; 2 is the past
SIDE = 28
GRID = GridTHW(1, 2, 2)


class Neighbours:
    """Everything around one ViT."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        epochs = dict.fromkeys((VIT_0, PREPROCESS, LLM_0), EPOCH)
        self.sockets = Sockets(run_dir, epochs)
        self.status, self.control = self.sockets.receiver(STATUS), self.sockets.publisher(CONTROL)
        self.llm, self.feedback = self.sockets.receiver(LLM), self.sockets.receiver(FEEDBACK)
        self.encode = self.sockets.sender(ENCODE)
        limits = PreprocessConfig(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
        config = Config(
            model=ModelConfig(dtype="float32"),
            preprocess=limits,
            vit=VitConfig(embedding_pool_mib=0, vit_max_batch_patches=8),
        )
        self.server = ForkServer(os.environ)
        self.server.start()
        spec = WorkerSpec(
            worker=VIT_0, epochs={str(worker): epoch for worker, epoch in epochs.items()},
            run_dir=str(run_dir), model_folder=str(folder),
            placement=Placement(cores=(0,), num_threads=1), config=config,
        )  # fmt: skip
        self.process = self.server.fork(spec)
        self.largest = read_model_info(folder, limits.min_pixels, limits.max_pixels).vision.largest_pixels
        self.pixels = TensorPool.on_host("preprocess.0", EPOCH, 64 << 20, 1024)
        self.slots = SlotAllocator(64 << 20, 1 << 16, 1024)
        self.pools = PoolMap()
        self.stats: WorkerStats | None = None

    def wait_until_ready(self) -> None:
        poller, end = Poller(self.status), time.monotonic() + 60
        while time.monotonic() < end:
            while (received := self.status.receive()) is not None:
                assert not isinstance(received.message, WorkerFailed), received.message.error
                if isinstance(received.message, WorkerReady):
                    self.encode.send(PoolOpened(sender=PREPROCESS, epoch=EPOCH, pool=self.pixels.info))
                    return
            poller.wait(0.2)
        raise AssertionError("the ViT did not become ready")

    def ask(
        self,
        key: ChunkKey,
        arrival: int,
        mm_hash: bytes,
        height: int,
        width: int,
        with_pixels: bool = False,
        epoch: int = EPOCH,
    ) -> None:
        handle: TensorHandle | None = None
        if with_pixels:
            slot = self.slots.allocate(height * width * 3)
            assert slot is not None
            handle = self.pixels.lend(slot, (1, height, width, 3), "uint8")
            self.pixels.array(handle)[:] = np.random.default_rng(list(mm_hash)).integers(
                0, 256, handle.shape, dtype=np.uint8
            )
        self.encode.send(
            EncodeRequest(
                sender=PREPROCESS, epoch=epoch, key=key, arrival=arrival, position=key.item, mm_hash=mm_hash,
                grid_thw=GridTHW(1, height // 14, width // 14), pixels=handle,
            )
        )  # fmt: skip

    def messages(self, timeout_s: float = 0.05) -> list[Any]:
        Poller(self.llm, self.feedback).wait(timeout_s)
        found = []
        for receiver in (self.llm, self.feedback):
            while (received := receiver.receive()) is not None:
                found.append(received.message)
                if isinstance(received.message, PoolOpened):
                    self.pools.open(received.message.pool)
        while (received := self.status.receive()) is not None:
            assert not isinstance(received.message, WorkerFailed), received.message.error
            self.stats = received.message if isinstance(received.message, WorkerStats) else self.stats
        return found

    def wait_for(self, kind: type, timeout_s: float = 10) -> Any:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for message in self.messages():
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came")

    def close(self) -> None:
        self.control.subscriptions()
        self.control.publish(PipelineState(workers=(), end=""))
        assert self.process.wait(10)
        assert self.process.exit_code == 0
        self.pools.close(str(VIT_0))
        self.pixels.close()
        self.sockets.close()


@pytest.fixture
def around(tmp_path: Path) -> Iterator[Neighbours]:
    folder = make_checkpoint(tmp_path / "model")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    made = Neighbours(folder, run_dir)
    try:
        made.wait_until_ready()
        yield made
        made.close()
    finally:
        made.server.close()


def test_8_requests_of_64_pictures_in_reverse_order_through_a_pool_of_three(around: Neighbours) -> None:
    """All are announced in order; pixels come youngest first; the LLM reads a request's pictures in order and
    holds what it cannot use yet."""
    width = around.largest // SIDE // 28 * 28  # as large as a picture can be here: exactly three fit the pool
    announced = [(request, item) for request in range(8) for item in range(64)]
    for request, item in announced:
        around.ask(ChunkKey(f"r{request}", 1, item, 0), request, bytes([request, item]), SIDE, width)
    missing, late = set(announced), list(reversed(announced))
    wanted = [deque(range(64)) for _ in range(8)]
    held: list[dict[int, int]] = [{} for _ in range(8)]
    num_released = most_held = 0
    end = time.monotonic() + 90
    while any(wanted) and time.monotonic() < end:
        for request, item in late[:40]:
            around.ask(
                ChunkKey(f"r{request}", 1, item, 0),
                request,
                bytes([request, item]),
                SIDE,
                width,
                with_pixels=True,
            )
        late = late[40:]
        for message in around.messages():
            match message:
                case EmbeddingReady(key=key):
                    held[int(key.request_id[1:])][key.item] = message.lease_id
                    tensor = around.pools.tensor(message.embeddings)
                    assert tensor.isfinite().all()
                case EncodeMiss(key=key):
                    missing.discard((int(key.request_id[1:]), key.item))
                case PixelsReleased():
                    num_released += 1
                case EncodeFailed():
                    raise AssertionError(message)
        most_held = max(most_held, sum(map(len, held)))
        for request, items in enumerate(wanted):
            while items and items[0] in held[request]:
                lease_id = held[request].pop(items.popleft())
                around.encode.send(LeaseReleased(sender=LLM_0, epoch=EPOCH, lease_ids=(lease_id,)))
    assert not any(wanted), f"stuck with {[len(items) for items in wanted]} left, {held} held"
    assert 0 < most_held <= 3, "the pool holds three"
    assert not missing
    while num_released < len(announced) and time.monotonic() < end:
        num_released += sum(isinstance(message, PixelsReleased) for message in around.messages())
    assert num_released == len(announced)


def test_stale_frames_are_dropped_and_counted_and_what_follows_is_served(around: Neighbours) -> None:
    around.ask(ChunkKey("old", 1, 0, 0), 1, b"old", SIDE, SIDE, epoch=EPOCH - 1)
    around.ask(ChunkKey("new", 1, 0, 0), 1, b"new", SIDE, SIDE)
    assert around.wait_for(EncodeMiss).key.request_id == "new"
    end = time.monotonic() + 5
    while (
        around.stats is None or not around.stats.counters.get("stale_messages")
    ) and time.monotonic() < end:
        around.messages(0.2)
    assert around.stats is not None
    assert around.stats.counters["stale_messages"] == 1


def test_a_forged_handle_fails_its_chunk_only(around: Neighbours) -> None:
    key = ChunkKey("bad", 1, 0, 0)
    around.ask(key, 1, b"bad", SIDE, SIDE)
    around.wait_for(EncodeMiss)
    forged = TensorHandle("preprocess.0", EPOCH, 5, 99, 0, (1, SIDE, SIDE, 3), "uint8")
    around.encode.send(
        EncodeRequest(
            sender=PREPROCESS,
            epoch=EPOCH,
            key=key,
            arrival=1,
            position=0,
            mm_hash=b"bad",
            grid_thw=GRID,
            pixels=forged,
        )
    )
    assert around.wait_for(EncodeFailed).key == key
    good = ChunkKey("good", 1, 0, 0)
    around.ask(good, 2, b"good", SIDE, SIDE)
    around.ask(good, 2, b"good", SIDE, SIDE, with_pixels=True)
    assert around.wait_for(EmbeddingReady).key == good


def test_a_lost_release_heals_and_the_launcher_is_told_of_what_was_encoded(around: Neighbours) -> None:
    key = ChunkKey("r", 1, 0, 0)
    around.ask(key, 1, b"h", SIDE, SIDE)
    around.ask(key, 1, b"h", SIDE, SIDE, with_pixels=True)
    lease_id = around.wait_for(EmbeddingReady).lease_id
    for _ in range(2):
        around.encode.send(LeaseSet(sender=LLM_0, epoch=EPOCH, lease_ids=(), last_lease_id=lease_id))
    end = time.monotonic() + 5
    while time.monotonic() < end:
        told = {} if around.stats is None else around.stats.counters
        if told.get("encodes") and not told["leases"]:
            break
        around.messages(0.2)
    assert around.stats is not None
    assert around.stats.counters["leases"] == 0
    metrics = {metric.name: metric for metric in around.stats.metrics}
    assert (metrics["leases"].kind, metrics["encodes"].kind) == ("gauge", "counter")
    assert sum(metrics["stage_vit_seconds"].counts) == around.stats.counters["encodes"] == 1
    assert metrics["stage_vit_seconds"].total > 0
