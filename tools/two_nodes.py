"""Two nodes with a carrier each, for tests and `bench_carrier.py`: the other workers are played."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from launcher.members import doors_of
from pipeline.config import CarrierConfig, ClusterConfig, Config, VitConfig
from pipeline.process.process import Placement, ShutdownRequested, WorkerContext, WorkerSpec
from pipeline.transport.cluster import Cluster, NodeSpec, listen_at, url_of
from pipeline.transport.ends import Receiver
from pipeline.transport.joining import new_keys
from pipeline.transport.slots import SlotAllocator, align
from pipeline.transport.sockets import Sockets
from pipeline.transport.tensors import TensorPool
from pipeline.wire.control import NodeState, PipelineState, WorkerState, WorkerStats
from pipeline.wire.topology import CONTROL, STATUS, Role, WorkerId
from workers.carrier.worker import Largest, serve

T = TypeVar("T")
HasEnded = Callable[[], bool]
Start = Callable[[WorkerSpec, Sequence[int]], HasEnded]
PREPROCESS = WorkerId(Role.PREPROCESS)
VITS = WorkerId(Role.VIT, 0), WorkerId(Role.VIT, 1)
LEADS = WorkerId(Role.LLM, 0), WorkerId(Role.LLM, 1)
CARRIERS = WorkerId(Role.CARRIER, 0), WorkerId(Role.CARRIER, 1)
WORKERS = (PREPROCESS, *VITS, *LEADS, *CARRIERS)
LARGEST = 8 << 20
PATIENCE_S = 60.0


def wait_for(get: Callable[[], T | None]) -> T:
    end = time.monotonic() + PATIENCE_S
    while (found := get()) is None:
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.002)
    return found


def carry(spec: WorkerSpec, descriptors: Sequence[int]) -> None:
    """A carrier's work, until the pipeline ends."""
    context = WorkerContext(spec, descriptors)
    try:
        with contextlib.suppress(ShutdownRequested):
            serve(context, Largest(LARGEST, LARGEST))
    finally:
        context.sockets.close()


class TwoNodes:
    """Node n has ViT n and the group that LLM rank n leads."""

    def __init__(self, folder: Path, carrier: str = "zeromq", start: Start | None = None) -> None:
        """`start` runs a carrier, to which the descriptors belong from then on, and returns what says whether
        it has ended; None: in a thread."""
        self._start = start or self._start_thread
        self.folder, self.epochs = folder, dict.fromkeys(WORKERS, 1)
        self._keys = [new_keys() for _ in range(2)]
        self._config = Config(
            cluster=ClusterConfig(nnodes=2, master_addr="127.0.0.1", node_token_file="x"),
            vit=VitConfig(vit=1), carrier=CarrierConfig(carrier=carrier, carrier_pool_mib=1),
        )  # fmt: skip
        # By worker and label; ZeroMQ closes those that it is given.
        self._doors: dict[WorkerId, dict[str, int]] = {}
        self._urls: dict[WorkerId, dict[str, str]] = {}
        for worker in WORKERS:
            self._listen(worker)
        self._launchers = [Sockets(self.run_dir(node), {}) for node in range(2)]
        self._controls = [one.publisher(CONTROL) for one in self._launchers]
        self.status = [one.receiver(STATUS) for one in self._launchers]
        self._opened: list[Sockets] = []
        self._threads = ThreadPoolExecutor(4)
        self._running: list[HasEnded] = []
        self._pools: list[TensorPool] = []

    def run_dir(self, node: int) -> Path:
        path = self.folder / f"n{node}"
        path.mkdir(exist_ok=True)
        return path

    def _listen(self, worker: WorkerId) -> None:
        doors = {label: listen_at("127.0.0.1") for label in doors_of(worker, self._config)}
        self._urls[worker] = {label: url_of(door.fileno()) for label, door in doors.items()}
        self._doors[worker] = {label: door.detach() for label, door in doors.items()}

    def _spec(self, worker: WorkerId) -> NodeSpec:
        spec = NodeSpec(node=0, vits_per_node=1, ranks_per_node=1, own=self._keys[0])
        node = spec.node_of(worker)
        return dataclasses.replace(
            spec, node=node, own=self._keys[node], doors=tuple(self._doors[worker]),
            keys={number: keys.public for number, keys in enumerate(self._keys)},
            urls={str(one): urls for one, urls in self._urls.items()},
        )  # fmt: skip

    def _descriptors(self, worker: WorkerId) -> list[int]:
        """To be given away, once."""
        return list(self._doors.pop(worker).values())

    def sockets(self, worker: WorkerId) -> Sockets:
        """Of a worker that is played."""
        spec = self._spec(worker)
        cluster = Cluster(spec, self._descriptors(worker), worker.role)
        self._opened.append(Sockets(self.run_dir(spec.node), self.epochs, cluster=cluster))
        return self._opened[-1]

    def state(self, end: str | None = None) -> PipelineState:
        return PipelineState(
            workers=tuple(
                WorkerState(worker, epoch, True, urls=self._urls[worker])
                for worker, epoch in self.epochs.items()
            ),
            nodes=tuple(NodeState(number, public_key=keys.public) for number, keys in enumerate(self._keys)),
            end=end,
        )  # fmt: skip

    def publish(self, end: str | None = None) -> None:
        state = self.state(end)
        for control in self._controls:
            control.subscriptions()
            control.publish(state)

    def start_carriers(self) -> None:
        for carrier in CARRIERS:
            self.start_carrier(carrier.rank)
        for status in self.status:
            wait_for(status.receive)  # READY

    def start_carrier(self, node: int) -> None:
        worker = CARRIERS[node]
        spec = WorkerSpec(
            worker=worker, epochs={str(one): epoch for one, epoch in self.epochs.items()},
            run_dir=str(self.run_dir(node)), model_folder="", placement=Placement(cores=(0,), num_threads=1),
            config=self._config, node=self._spec(worker),
        )  # fmt: skip
        self._running.append(self._start(spec, self._descriptors(worker)))

    def _start_thread(self, spec: WorkerSpec, descriptors: Sequence[int]) -> HasEnded:
        running = self._threads.submit(carry, spec, descriptors)

        def has_ended() -> bool:
            """Raises what has ended it."""
            if running.done():
                running.result()
            return running.done()

        return has_ended

    def pool(self, worker: WorkerId) -> tuple[TensorPool, SlotAllocator]:
        nbytes = 4 * align(LARGEST)
        self._pools.append(TensorPool.on_host(str(worker), self.epochs[worker], nbytes, 16))
        return self._pools[-1], SlotAllocator(nbytes, LARGEST, 16)

    def receive(self, receiver: Receiver[Any], kind: type[T]) -> T:
        """The next message of a kind; others before it are dropped."""

        def get() -> T | None:
            self._check()
            received = receiver.receive()
            return received.message if received is not None and isinstance(received.message, kind) else None

        return wait_for(get)

    def copies(self, node: int) -> dict[str, float]:
        """The tensors that the node's carrier has copied, by transport, as it reports them."""

        def get() -> dict[str, float] | None:
            received = self.status[node].receive()
            if received is None or not isinstance(received.message, WorkerStats):
                return None
            told = next(one for one in received.message.metrics if one.name == "carrier_copies")
            return dict(told.values) or None

        return wait_for(get)

    def _check(self) -> None:
        for has_ended in self._running:
            has_ended()

    def close(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not all(has_ended() for has_ended in self._running):
            self.publish(end="")
            time.sleep(0.02)
            assert time.monotonic() < end, "a carrier does not end"
        self._threads.shutdown()
        for sockets in (*self._opened, *self._launchers):
            sockets.close()
        for descriptors in self._doors.values():
            for descriptor in descriptors.values():
                os.close(descriptor)
        for pool in self._pools:
            pool.close()
        self._check()


@contextlib.contextmanager
def two_nodes(folder: Path, carrier: str = "zeromq", start: Start | None = None) -> Iterator[TwoNodes]:
    nodes = TwoNodes(folder, carrier, start)
    try:
        yield nodes
    finally:
        nodes.close()
