"""Edges between nodes: two sockets of one edge, keys, addresses that come and go, and who is refused."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.transport.cluster import Cluster, NodeSpec, listen_at, url_of
from pipeline.transport.ends import Receiver
from pipeline.transport.joining import HeadAddress, JoinListener, LaunchersKeys, new_keys, read_token
from pipeline.transport.keys import KeyPair
from pipeline.transport.poller import Poller
from pipeline.transport.sockets import Sockets
from pipeline.wire.base import ChunkKey
from pipeline.wire.clients import TokenOutputs
from pipeline.wire.control import NodeState, PipelineState, WorkerState, WorkerStats
from pipeline.wire.encoding import LeaseReleased, PixelsReleased
from pipeline.wire.nodes import NodeOrders, StatusPassedOn
from pipeline.wire.topology import ENCODE, FEEDBACK, ORDERS, OUTPUTS, REPORTS, Role, WorkerId
from tests.fakes import LLM_0, PREPROCESS, VIT_0
from tests.waiting import wait_for

VIT_1 = WorkerId(Role.VIT, 1)
EPOCHS = {LLM_0: 1, VIT_0: 1, VIT_1: 1, PREPROCESS: 1, WorkerId(Role.LLM, 1): 1}
MESSAGE = LeaseReleased(sender=LLM_0, epoch=1, lease_ids=(7,))


class Nodes:
    """Two nodes with one ViT and one LLM each; each has a run directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.keys = [new_keys(), new_keys()]
        self.folders = [folder / "0", folder / "1"]
        for path in self.folders:
            path.mkdir()
        self.opened = ExitStack()

    def spec(self, node: int, own: KeyPair | None = None, **changes: Any) -> NodeSpec:
        publics = {number: pair.public for number, pair in enumerate(self.keys)}
        return NodeSpec(
            node=node, vits_per_node=1, ranks_per_node=1, own=own or self.keys[node], keys=publics, **changes
        )

    def sockets(self, spec: NodeSpec, doors: tuple[socket.socket, ...] = ()) -> Sockets:
        cluster = Cluster(spec, [door.fileno() for door in doors])
        made = Sockets(self.folders[spec.node], EPOCHS, cluster=cluster)
        self.opened.callback(made.close)
        return made

    def bound(self, node: int, label: str) -> tuple[Sockets, str]:
        """A worker that binds the edge for both nodes, and where the other one reaches it."""
        door = listen_at("127.0.0.1")
        url = url_of(door.fileno())
        made = self.sockets(self.spec(node, doors=(label,)), (door,))
        self.opened.callback(door.detach)  # it is ZeroMQ's now
        return made, url


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    with made.opened:
        yield made


def state(url: str = "", epoch: int = 1, keys: tuple[bytes, ...] = ()) -> PipelineState:
    urls = {"encode.1": url} if url else {}
    return PipelineState(
        workers=(WorkerState(VIT_1, epoch, is_ready=True, urls=urls),),
        nodes=tuple(NodeState(number, key) for number, key in enumerate(keys)),
    )


def test_one_edge_has_peers_on_both_nodes(nodes: Nodes) -> None:
    vit, url = nodes.bound(1, "encode.1")
    inbox = vit.receiver(ENCODE, 1)
    near = nodes.sockets(nodes.spec(1)).sender(ENCODE, 1)
    far = nodes.sockets(nodes.spec(0, urls={"vit.1": {"encode.1": url}})).sender(ENCODE, 1)
    assert near.url.startswith("ipc://")
    assert far.url == url
    poller = Poller(inbox)
    for sender in (near, far):
        sender.send(MESSAGE)
        poller.wait(20)
        assert wait_for(inbox.receive).message == MESSAGE
    for _ in range(50):
        near.send(MESSAGE)
        far.send(MESSAGE)
    assert [wait_for(inbox.receive).message for _ in range(100)] == [MESSAGE] * 100


async def test_an_event_loop_reads_both_too_and_loses_nothing_when_cancelled(nodes: Nodes) -> None:
    preprocess, url = nodes.bound(0, "feedback.0")
    inbox = preprocess.async_receiver(FEEDBACK)
    near = nodes.sockets(nodes.spec(0)).sender(FEEDBACK)
    far = nodes.sockets(nodes.spec(1, urls={"preprocess.0": {"feedback.0": url}})).sender(FEEDBACK)
    message = PixelsReleased(sender=VIT_0, epoch=1, key=ChunkKey("r", 1, 0, 0))
    for number in range(20):
        waiting = asyncio.create_task(inbox.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        (near if number % 2 else far).send(message)
        assert (await asyncio.wait_for(inbox.receive(), 20)).message == message


def test_a_publisher_serves_subscribers_of_both(nodes: Nodes) -> None:
    rank, url = nodes.bound(0, "outputs.0")
    outputs = rank.publisher(OUTPUTS, lambda topic, _: len(topic) == 16)
    near = nodes.sockets(nodes.spec(0)).subscriber(OUTPUTS, b"n" * 16)
    far = nodes.sockets(nodes.spec(1, urls={"llm.0": {"outputs.0": url}})).subscriber(OUTPUTS, b"f" * 16)
    seen: list[Any] = []
    assert wait_for(lambda: seen.extend(outputs.subscriptions()) or len(seen) == 2)
    for topic, subscriber, other in ((b"n" * 16, near, far), (b"f" * 16, far, near)):
        message = TokenOutputs(outputs=(), sender=LLM_0, epoch=1)
        assert outputs.publish(message, topic)
        assert wait_for(subscriber.receive).message == message
        assert other.receive() is None


def test_a_peer_without_an_address_costs_nothing_and_one_that_comes_is_told_of(nodes: Nodes) -> None:
    sockets = nodes.sockets(nodes.spec(0))
    sender = sockets.sender(ENCODE, 1)
    assert sender.url == ""
    vit, url = nodes.bound(1, "encode.1")
    inbox = vit.receiver(ENCODE, 1)
    keys = tuple(pair.public for pair in nodes.keys)
    assert sockets.follow(state(keys=keys[:1])) == []
    sender.reconnect("")
    sender.send(MESSAGE)  # dropped
    assert sockets.follow(state(url, keys=keys)) == [VIT_1], "what was sent before is lost"
    assert sockets.follow(state(url, keys=keys)) == []
    sender.send(MESSAGE)
    assert wait_for(inbox.receive).message == MESSAGE
    assert inbox.receive() is None
    assert sockets.follow(state("", epoch=2, keys=keys)) == [VIT_1]
    assert sender.url == ""
    for _ in range(3):
        sender.send(MESSAGE)  # waits for the successor
    successor, other = nodes.bound(1, "encode.1")
    inbox = successor.receiver(ENCODE, 1)
    assert sockets.follow(state(other, epoch=2, keys=keys)) == [], "nothing is lost"
    sender.send(MESSAGE)
    assert [wait_for(inbox.receive).message for _ in range(4)] == [MESSAGE] * 4
    assert sockets.follow(state("", epoch=3, keys=keys)) == [VIT_1]
    sender.send(MESSAGE)
    assert sockets.follow(state("", epoch=4, keys=keys)) == [VIT_1], "what waits is not for this one"
    last, url = nodes.bound(1, "encode.1")
    inbox = last.receiver(ENCODE, 1)
    assert sockets.follow(state(url, epoch=4, keys=keys)) == []
    sender.send(MESSAGE)
    assert wait_for(inbox.receive).message == MESSAGE
    assert inbox.receive() is None
    assert sockets.follow(state("", epoch=4)) == [VIT_1], "its node has left"
    sender.send(MESSAGE)  # dropped
    assert sender.drops


def test_a_key_of_no_node_is_refused(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    vit, url = nodes.bound(1, "encode.1")
    inbox = vit.receiver(ENCODE, 1)
    stranger = nodes.sockets(nodes.spec(0, new_keys(), urls={"vit.1": {"encode.1": url}}))
    stranger.sender(ENCODE, 1).send(MESSAGE)
    assert wait_for(lambda: "a key of no node was refused" in caplog.text)
    assert inbox.receive() is None


def test_a_node_whose_key_is_learned_later_gets_through(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """A binder that starts has the keys of its fork until it is ready."""
    vit, url = nodes.bound(1, "encode.1")
    inbox = vit.receiver(ENCODE, 1)
    late = new_keys()
    far = nodes.sockets(nodes.spec(0, late, urls={"vit.1": {"encode.1": url}})).sender(ENCODE, 1)
    assert wait_for(lambda: "a key of no node was refused" in caplog.text)
    far.send(MESSAGE)  # waits
    vit.follow(state(url, keys=(late.public, nodes.keys[1].public)))
    assert wait_for(inbox.receive).message == MESSAGE


class Recorder:
    """A proxy that keeps what a client sends. Use as a context manager."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target, self.recorded = target, b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        client, _ = self._listening.accept()
        with client, socket.create_connection(self._target) as server:
            others = {client: server, server: client}
            while not self._is_over.is_set():
                for source in select.select(list(others), [], [], 0.05)[0]:
                    data = source.recv(1 << 16)
                    if source is client:
                        self.recorded += data
                    others[source].sendall(data)


def test_what_was_recorded_is_refused_when_it_is_sent_again(nodes: Nodes) -> None:
    vit, url = nodes.bound(1, "encode.1")
    inbox: Receiver[Any] = vit.receiver(ENCODE, 1)
    port = int(url.rpartition(":")[2])
    with Recorder(("127.0.0.1", port)) as recorder:
        between = f"tcp://127.0.0.1:{recorder.port}"
        sender = nodes.sockets(nodes.spec(0, urls={"vit.1": {"encode.1": between}})).sender(ENCODE, 1)
        sender.send(MESSAGE)
        assert wait_for(inbox.receive).message == MESSAGE
    assert b"lease_ids" not in recorder.recorded, "it is encrypted"
    with socket.create_connection(("127.0.0.1", port)) as again:
        again.settimeout(1)
        again.sendall(recorder.recorded)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while again.recv(1 << 16):  # the greeting; then the handshake fails
                pass
    assert inbox.receive() is None
    assert inbox.num_refused == 0, "nothing came through"


# Launchers.


@pytest.mark.parametrize("is_right", [True, False])
def test_the_token_decides_who_may_report(is_right: bool) -> None:
    first = listen_at("127.0.0.1")
    port = first.getsockname()[1]
    first.close()
    token = b"t" * 16
    head = Sockets(JoinListener("127.0.0.1", port, LaunchersKeys(token)), {})
    reports, orders = head.receiver(REPORTS), head.publisher(ORDERS, lambda topic, _: len(topic) == 16)
    address = HeadAddress("127.0.0.1", port, LaunchersKeys(token if is_right else b"u" * 16))
    node = Sockets(address, {})
    sender, inbox = node.sender(REPORTS), node.subscriber(ORDERS, b"n" * 16)
    message = StatusPassedOn(node_id=b"n" * 16, status=WorkerStats(sender=VIT_1, epoch=1, phase="serving"))
    sender.send(message)
    try:
        if is_right:
            assert wait_for(reports.receive).message == message
            assert wait_for(orders.subscriptions)
            order = NodeOrders(heard=0, workers=(), state=PipelineState(workers=()))
            orders.publish(order, b"n" * 16)
            assert wait_for(inbox.receive).message == order
        else:
            assert wait_for(lambda: address.read_handshakes() or address.num_failed_handshakes >= 2)
            assert reports.receive() is None
    finally:
        address.stop_watching()
        node.close()
        head.close()


def test_tokens(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_token(path)
    path.write_text("a" * 32 + "\n")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="open to other users: chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == b"a" * 32
    path.write_text("short")
    with pytest.raises(ValueError, match="holds 5 characters: at least 16"):
        read_token(path)


def test_ports(tmp_path: Path) -> None:
    with listen_at("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1, ports {port} to {port}: "):
            listen_at("127.0.0.1", range(port, port + 1))
