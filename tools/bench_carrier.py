"""How long the embeddings of a picture take from one node to another, by carriers and without.

    python -m tools.bench_carrier

Carriers: from the ViT's message to the lead's, with the tensor in memory that the lead maps; in between are
two carriers, each a process, and CURVE. Compared are the same bytes, sent to a process that receives them and
answers: over CURVE for ZeroMQ, and over a plain tcp connection for NIXL, which is held to tcp, too (on one
machine it would take shared memory). The ways take turns in one run. Told are medians.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import zmq

from launcher.environment import UCX_OVER_TCP
from pipeline.process.process import WorkerSpec
from pipeline.transport.ends import Receiver
from pipeline.wire.base import ChunkKey, Order, PoolOpened
from pipeline.wire.control import WorkerStats
from pipeline.wire.encoding import LeaseReleased
from pipeline.wire.generation import EmbeddingReady, LlmMessage
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import CARRY, LLM
from tools.two_nodes import LEADS, VITS, HasEnded, TwoNodes, carry, two_nodes, wait_for
from workers.carrier.nixl_agent import load_nixl

NUM_TOKENS = 1024
WIDTHS = {"3 MB": 1536, "7 MB": 3584}  # of an embedding in 16 bits: Qwen2-VL 2B and 7B
WARM_UP = 5
MODULE = "tools.bench_carrier"
Way = Callable[[int], float]


class Carried:
    """ViT 1 of node 1 and lead 0 of node 0, both played here."""

    def __init__(self, nodes: TwoNodes, kind: str) -> None:
        self._nodes, self.kind = nodes, kind
        vit, lead = nodes.sockets(VITS[1]), nodes.sockets(LEADS[0])
        self._inbox: Receiver[LlmMessage] = lead.receiver(LLM, 0)
        nodes.start_carriers()
        self._to_lead, to_carrier = vit.sender(LLM, 0), vit.sender(CARRY, 1)
        self._to_own_carrier = lead.sender(CARRY, 0)
        self._pool, self._allocator = nodes.pool(VITS[1])
        opened = PoolOpened(pool=self._pool.info, receiver_epoch=1, sender=VITS[1], epoch=1)
        self._to_lead.send(opened)
        to_carrier.send(opened)
        self._number = 0

    def wait_until_proven(self) -> None:
        """Until tensors come by the transport that is measured."""

        def get() -> bool | None:
            received = self._nodes.status[0].receive()
            if received is None or not isinstance(received.message, WorkerStats):
                return None
            kinds = next(one.values for one in received.message.metrics if one.name == "carrier_kind")
            return (f"1.{self.kind}", 1) in kinds or None

        wait_for(get)

    def hand_off(self, width: int) -> float:
        """Seconds. Each time it is another slot's generation, so that no copy is found."""
        self._number += 1
        handle = self._lend(width)
        ready = EmbeddingReady(
            sender=VITS[1], epoch=1, key=ChunkKey("r", 1, self._number, 0), lease_id=self._number,
            embeddings=handle, was_encoded=True, order=Order(1, self._number),
        )  # fmt: skip
        start = time.perf_counter()
        self._to_lead.send(ready)
        while True:
            received = self._inbox.receive()
            if received is not None and isinstance(received.message, EmbeddingReady):
                break
            self._inbox.socket.poll(1000)
        seconds = time.perf_counter() - start
        released = LeaseReleased(lease_ids=(received.message.lease_id,), sender=LEADS[0], epoch=1)
        self._to_own_carrier.send(released)
        return seconds

    def _lend(self, width: int) -> TensorHandle:
        slot = self._allocator.allocate(2 * NUM_TOKENS * width)
        assert slot is not None
        handle = self._pool.lend(slot, (NUM_TOKENS, width), "bfloat16")
        self._allocator.free(slot)  # the next one has the same place and the next generation
        return handle


def start_carrier(spec: WorkerSpec, descriptors: Sequence[int]) -> HasEnded:
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--carry", ",".join(map(str, descriptors))],
        stdin=subprocess.PIPE, pass_fds=descriptors,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(msgspec.msgpack.encode(spec))
    process.stdin.close()
    for descriptor in descriptors:
        os.close(descriptor)
    return lambda: process.poll() is not None


@contextmanager
def carried(kind: str) -> Iterator[Carried]:
    with tempfile.TemporaryDirectory() as folder, two_nodes(Path(folder), kind, start_carrier) as nodes:
        made = Carried(nodes, kind)
        made.wait_until_proven()
        yield made


@contextmanager
def by_curve(data: memoryview) -> Iterator[Way]:
    """A message with the bytes behind it; the answer comes through a Unix socket."""
    public, secret = zmq.curve_keypair()
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        answers, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        answers.bind(f"ipc://{folder}/answers")
        command = [sys.executable, "-m", MODULE, "--receive", f"ipc://{folder}/answers", secret.decode()]
        with subprocess.Popen(command) as process:
            url = answers.recv().decode()
            sender.curve_serverkey = public
            sender.curve_publickey, sender.curve_secretkey = zmq.curve_keypair()
            sender.connect(url)

            def send(width: int) -> float:
                start = time.perf_counter()
                sender.send_multipart([b"tensor", data[: 2 * NUM_TOKENS * width]], copy=False)
                answers.recv()
                return time.perf_counter() - start

            yield send
            sender.send_multipart([b"end"])
            process.wait()
        for one in (answers, sender):
            one.close()


def receive_by_curve(answer_url: str, secret: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as answers:
        inbox.curve_server = True
        inbox.curve_secretkey = secret.encode()
        port = inbox.bind_to_random_port("tcp://127.0.0.1")
        answers.connect(answer_url)
        answers.send(f"tcp://127.0.0.1:{port}".encode())
        while inbox.recv_multipart(copy=False)[0].bytes != b"end":
            answers.send(b"")


@contextmanager
def by_tcp(data: memoryview) -> Iterator[Way]:
    """A plain connection, into memory that is there already."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-m", MODULE, "--receive-plain", str(listening.getsockname()[1])]
        with subprocess.Popen(command) as process:
            connection, _ = listening.accept()

            def send(width: int) -> float:
                nbytes = 2 * NUM_TOKENS * width
                start = time.perf_counter()
                connection.sendall(nbytes.to_bytes(8, "little"))
                connection.sendall(data[:nbytes])
                connection.recv(1)
                return time.perf_counter() - start

            yield send
            connection.close()
            process.wait()


def receive_plain(port: int) -> None:
    room = memoryview(bytearray(2 * NUM_TOKENS * max(WIDTHS.values())))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while header := connection.recv(8, socket.MSG_WAITALL):
            nbytes = int.from_bytes(header, "little")
            taken = 0
            while taken < nbytes:
                taken += connection.recv_into(room[taken:nbytes])
            connection.send(b"!")


def measure(ways: Sequence[Way], width: int, rounds: int) -> list[float]:
    """The median of each, in turns."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + WARM_UP):
        for way, seconds in zip(ways, taken, strict=True):
            found = way(width)
            if number >= WARM_UP:
                seconds.append(found)
    return [statistics.median(seconds) for seconds in taken]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--by", nargs="+", choices=("zeromq", "nixl"), default=["zeromq", "nixl"])
    parser.add_argument("--carry", help=argparse.SUPPRESS)
    parser.add_argument("--receive", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--receive-plain", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.carry:
        spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WorkerSpec)
        carry(spec, [int(one) for one in args.carry.split(",")])
    elif args.receive:
        receive_by_curve(*args.receive)
    elif args.receive_plain:
        receive_plain(args.receive_plain)
    else:
        compare(args.rounds, args.by)


def compare(rounds: int, kinds: Sequence[str]) -> None:
    data = memoryview(os.urandom(2 * NUM_TOKENS * max(WIDTHS.values())))
    print("| embeddings | by | ms | compared with | ms | ratio |\n| --- | --- | --- | --- | --- | --- |")
    if "zeromq" in kinds:
        show("zeromq", "the same bytes over CURVE", by_curve(data), rounds)
    if "nixl" in kinds and load_nixl() is not None:
        for name, value in {"UCX_TLS": "tcp", **UCX_OVER_TCP}.items():
            os.putenv(name, value)
        show("nixl", "the same bytes over plain tcp", by_tcp(data), rounds)


def show(kind: str, other: str, open_other: AbstractContextManager[Way], rounds: int) -> None:
    with carried(kind) as ours, open_other as theirs:
        for size, width in WIDTHS.items():
            carriers, bare = (1e3 * seconds for seconds in measure([ours.hand_off, theirs], width, rounds))
            print(f"| {size} | {kind} | {carriers:.2f} | {other} | {bare:.2f} | {carriers / bare:.2f} |")


if __name__ == "__main__":
    main()
