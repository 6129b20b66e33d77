"""Each edge's failure cases with real sockets: slow joiner, slow subscriber, dead peer, successor, stale
frame, garbage."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pipeline.transport.ends import ALL, Receiver
from pipeline.transport.poller import Poller
from pipeline.transport.sockets import UNIONS, Sockets
from pipeline.wire.base import ChunkKey
from pipeline.wire.clients import Hello, RequestOutput, TokenOutputs
from pipeline.wire.control import PipelineState, WorkerState, WorkerStats
from pipeline.wire.encoding import CancelEncode, LeaseReleased
from pipeline.wire.errors import PipelineError
from pipeline.wire.limits import MAX_ITEMS
from pipeline.wire.sampling import FinishReason
from pipeline.wire.steps import StepPlan
from pipeline.wire.topology import (
    CONTROL,
    EDGES,
    ENCODE,
    INGEST,
    OUTPUTS,
    STATUS,
    STEPS,
    Pattern,
    Role,
    WorkerId,
    address,
)
from tests.fakes import LLM_0, PREPROCESS, VIT_0

EPOCHS = {LLM_0: 1, PREPROCESS: 1, VIT_0: 1, WorkerId(Role.API): 1, WorkerId(Role.CARRIER): 1}


@pytest.fixture
def open_sockets(tmp_path: Path) -> Iterator[Callable[..., Sockets]]:
    made: list[Sockets] = []

    def make(**epochs: int) -> Sockets:
        named = {worker: epochs.get(str(worker.role), epoch) for worker, epoch in EPOCHS.items()}
        made.append(Sockets(tmp_path, named))
        return made[-1]

    yield make
    for sockets in made:
        sockets.close()


def receive(receiver: Receiver[Any], timeout_s: float = 5.0) -> Any:
    poller, end = Poller(receiver), time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (received := receiver.receive()) is not None:
            return received
        poller.wait(0.1)
    raise AssertionError("nothing came")


def released(*lease_ids: int, epoch: int = 1) -> LeaseReleased:
    return LeaseReleased(sender=LLM_0, epoch=epoch, lease_ids=lease_ids)


def outputs(text: bytes, offset: int = 0) -> TokenOutputs:
    return TokenOutputs(sender=LLM_0, epoch=1, outputs=(RequestOutput("r", 1, offset, text, None),))


def test_every_edge_has_a_union_and_an_address(tmp_path: Path) -> None:
    assert set(UNIONS) == set(EDGES)
    urls = {address(tmp_path, edge, EPOCHS) for edge in EDGES}
    assert len(urls) == len(EDGES)
    assert f"ipc://{tmp_path}/encode.0.1" in urls


def test_a_run_directory_too_long_for_a_socket_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="at most 107"):
        address(Path("/" + "x" * 110), CONTROL, EPOCHS)


def test_slow_joiner_on_push_pull_loses_nothing(open_sockets: Callable[..., Sockets]) -> None:
    sender = open_sockets().sender(ENCODE)
    for number in range(100):
        sender.send(released(number))
    receiver = open_sockets().receiver(ENCODE)
    assert [receive(receiver).message.lease_ids for _ in range(100)] == [(number,) for number in range(100)]


def test_a_dead_peers_queue_never_reaches_its_successor(open_sockets: Callable[..., Sockets]) -> None:
    sender = open_sockets().sender(ENCODE)
    sender.send(released(1))  # queued for epoch 1, which is not there
    successor = open_sockets(vit=2)
    receiver = successor.receiver(ENCODE)
    sender.reconnect(successor.site.url(ENCODE, successor.epochs))
    sender.send(released(2))
    assert receive(receiver).message.lease_ids == (2,)
    time.sleep(0.1)
    assert receiver.receive() is None


def test_a_killed_peer_and_its_successor_at_a_new_epoch(
    open_sockets: Callable[..., Sockets], tmp_path: Path
) -> None:
    script = (
        "import sys, pathlib\nfrom pipeline.transport.poller import *\n"
        "from pipeline.transport.sockets import *\nfrom pipeline.wire.topology import *\n"
        "r = Sockets(pathlib.Path(sys.argv[1]), {WorkerId(Role.VIT): 1}).receiver(ENCODE)\nPoller(r).wait()\n"
        "print(r.receive() is not None, flush=True)\nPoller(r).wait(60)\nimport time; time.sleep(60)"
    )
    peer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    sender = open_sockets().sender(ENCODE)
    sender.send(released(1))
    assert peer.stdout is not None
    assert peer.stdout.readline() == b"True\n"
    peer.kill()
    peer.wait()
    peer.stdout.close()
    for number in range(2, 5):
        sender.send(released(number))  # into the void: no error, and no block
    successor = open_sockets(vit=2)
    receiver = successor.receiver(ENCODE)
    sender.reconnect(successor.site.url(ENCODE, successor.epochs))
    sender.send(released(5))
    assert receive(receiver).message.lease_ids == (5,)


def test_a_full_queue_is_an_error_and_never_a_wait(open_sockets: Callable[..., Sockets]) -> None:
    sender = open_sockets().sender(ENCODE, high_water_mark=10)
    start = time.monotonic()
    for number in range(10):
        sender.send(released(number))
    with pytest.raises(PipelineError, match="full at 10 messages"):
        sender.send(released(10))
    assert time.monotonic() - start < 1
    stats = open_sockets().sender(STATUS, high_water_mark=5)
    sent = [stats.try_send(WorkerStats(sender=VIT_0, epoch=1, phase="serving")) for _ in range(20)]
    assert sent == [True] * 5 + [False] * 15


def test_garbage_is_refused_and_counted_and_what_follows_arrives(
    open_sockets: Callable[..., Sockets], tmp_path: Path
) -> None:
    receiver = open_sockets().receiver(ENCODE)
    with zmq.Context() as context, context.socket(zmq.PUSH) as raw:
        raw.connect(address(tmp_path, ENCODE, EPOCHS))
        good = msgspec.msgpack.encode(released(7))
        unknown_field = msgspec.msgpack.encode({**msgspec.msgpack.decode(good), "extra": 1})
        garbage = [
            b"",
            b"\xc1\xff\xff",
            os.urandom(100),
            msgspec.msgpack.encode({"type": "NoSuchMessage"}),
            msgspec.msgpack.encode({"type": "LeaseReleased"}),
            unknown_field,
            msgspec.msgpack.encode(Hello(client_id=b"x", protocol=1)),  # of another edge
            b"\x92" * 5000,  # nested beyond reason
        ]
        for frame in garbage:
            raw.send(frame)
        raw.send_multipart([good, *[b"x"] * (MAX_ITEMS + 1)])
        raw.send(good)
        assert receive(receiver).message == released(7)
    assert receiver.num_refused == len(garbage) + 1


def test_a_message_beyond_the_size_limit_does_not_come_in(
    open_sockets: Callable[..., Sockets], tmp_path: Path
) -> None:
    async def run() -> None:
        receiver = open_sockets().async_receiver(INGEST, max_message_bytes=10_000)
        with zmq.Context() as context, context.socket(zmq.PUSH) as raw:
            raw.setsockopt(zmq.LINGER, 0)
            raw.connect(address(tmp_path, INGEST, EPOCHS))
            raw.send(bytes(1 << 20))
            sender = open_sockets().sender(INGEST)
            sender.send(Hello(client_id=b"c" * 16, protocol=1))
            received = await asyncio.wait_for(receiver.receive(), 5)
            assert isinstance(received.message, Hello)

    asyncio.run(run())


def test_media_ride_as_frames(open_sockets: Callable[..., Sockets]) -> None:
    receiver, sender = open_sockets().receiver(INGEST), open_sockets().sender(INGEST)
    media = [os.urandom(1 << 20), b"", b"small"]
    sender.send(Hello(client_id=b"c" * 16, protocol=1), media)
    received = receive(receiver)
    assert [bytes(frame) for frame in received.frames] == media


def test_only_exact_topics_are_served(open_sockets: Callable[..., Sockets]) -> None:
    """A subscription to the empty topic would read everyone's text."""
    client, spy = b"c" * 16, b"s" * 16
    publisher = open_sockets().publisher(OUTPUTS, lambda topic, _: len(topic) == 16)
    mine = open_sockets().subscriber(OUTPUTS, client)
    spies = [open_sockets().subscriber(OUTPUTS, topic) for topic in (ALL, client[:8], client + b"x", spy)]
    seen: list[bytes] = []
    end = time.monotonic() + 5
    while len(seen) < 2 and time.monotonic() < end:
        seen += [event.topic for event in publisher.subscriptions()]
        Poller(publisher).wait(0.1)
    time.sleep(0.1)
    assert sorted(seen + [event.topic for event in publisher.subscriptions()]) == [client, spy]
    assert publisher.num_refused == 3
    assert publisher.publish(outputs(b"text"), client)
    assert receive(mine).message.outputs[0].new_token_ids == b"text"
    time.sleep(0.1)
    assert [receiver.receive() for receiver in spies] == [None] * 4


def wait_for_events(publisher: Any, count: int) -> list[Any]:
    events: list[Any] = []
    end = time.monotonic() + 5
    while len(events) < count and time.monotonic() < end:
        Poller(publisher).wait(0.1)
        events += publisher.subscriptions()
    return events


def test_a_slow_subscriber_is_named_and_costs_others_nothing(open_sockets: Callable[..., Sockets]) -> None:
    slow, fast = b"s" * 16, b"f" * 16
    publisher = open_sockets().publisher(OUTPUTS, lambda topic, _: len(topic) == 16, high_water_mark=50)
    sockets = open_sockets()
    receivers = {topic: sockets.subscriber(OUTPUTS, topic) for topic in (slow, fast)}
    receivers[slow].socket.setsockopt(zmq.RCVHWM, 10)
    assert len(wait_for_events(publisher, 2)) == 2
    payload = bytes(20_000)  # larger than what socket buffers swallow
    lagged = 0
    for number in range(70_000):
        if not publisher.publish(outputs(payload, number), slow):
            lagged = number
            break
    assert lagged, "a subscriber that never reads must be noticed"
    end = time.monotonic() + 20
    for number in range(200):
        # what it has read is credited to it now and then only
        while not publisher.publish(outputs(b"", number), fast):
            assert time.monotonic() < end
        assert receive(receivers[fast]).message.outputs[0].offset == number
    assert not publisher.publish(outputs(payload), slow)


def test_in_a_burst_each_subscription_is_judged_when_those_before_it_count(
    open_sockets: Callable[..., Sockets],
) -> None:
    known: set[bytes] = set()
    publisher = open_sockets().publisher(OUTPUTS, lambda topic, _: len(known) < 3)
    subscriber = open_sockets().subscriber(OUTPUTS, b"0" * 16)
    for number in range(1, 10):
        subscriber.socket.setsockopt(zmq.SUBSCRIBE, str(number).encode() * 16)
    end = time.monotonic() + 5
    while publisher.num_refused < 7 and time.monotonic() < end:
        known.update(event.topic for event in publisher.subscriptions(max_events=1))
    assert (len(known), publisher.num_refused) == (3, 7)


def test_on_control_who_does_not_read_loses_only_its_own(open_sockets: Callable[..., Sockets]) -> None:
    """All have the same topic there: a refusal would silence the launcher for everybody."""
    publisher = open_sockets().publisher(CONTROL, high_water_mark=50)
    sockets = open_sockets()
    slow, fast = (sockets.subscriber(CONTROL) for _ in range(2))
    slow.socket.setsockopt(zmq.RCVHWM, 10)
    assert len(wait_for_events(publisher, 2)) == 2
    large = PipelineState(
        workers=tuple(WorkerState(WorkerId(Role.LLM, rank), 1, True) for rank in range(500))
    )
    for _ in range(3000):
        assert publisher.publish(large)
        assert receive(fast).message == large


def test_a_dead_subscriber_shows(open_sockets: Callable[..., Sockets], tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, time\nfrom pipeline.transport.sockets import *\nfrom pipeline.wire.topology "
        "import *\n"
        "s = Sockets(pathlib.Path(sys.argv[1]), {WorkerId(Role.LLM): 1}).subscriber(OUTPUTS, b'd' * "
        "16)\ntime.sleep(60)"
    )
    publisher = open_sockets().publisher(OUTPUTS, lambda topic, _: len(topic) == 16)
    peer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    assert wait_for_events(publisher, 1) == [(b"d" * 16, True)]
    peer.kill()
    peer.wait()
    assert wait_for_events(publisher, 1) == [(b"d" * 16, False)]


def test_slow_joiner_on_pub_sub_is_seen_before_anything_is_published(
    open_sockets: Callable[..., Sockets],
) -> None:
    """Steps begin when all ranks have subscribed: then none is lost."""
    publisher = open_sockets().publisher(STEPS)
    ranks = [open_sockets().subscriber(STEPS) for _ in range(3)]
    assert len(wait_for_events(publisher, 3)) == 3
    for step in range(1, 101):
        assert publisher.publish(StepPlan(sender=LLM_0, epoch=1, step=step, started=(), sequences=()))
    for rank in ranks:
        assert [receive(rank).message.step for _ in range(100)] == list(range(1, 101))


def test_a_new_subscriber_to_control_gets_the_state(open_sockets: Callable[..., Sockets]) -> None:
    publisher = open_sockets().publisher(CONTROL)
    for _ in range(2):
        subscriber = open_sockets().subscriber(CONTROL)
        assert [event.is_new for event in wait_for_events(publisher, 1)] == [True]
        publisher.publish(PipelineState(workers=()))
        assert isinstance(receive(subscriber).message, PipelineState)


def test_every_message_survives_the_wire() -> None:
    for union in UNIONS.values():
        decoder = msgspec.msgpack.Decoder(union)
        assert decoder is not None
    key = ChunkKey("r", 1, 2, 3)
    for message, edge in (
        (CancelEncode(sender=PREPROCESS, epoch=4, keys=(key,)), ENCODE),
        (
            TokenOutputs(
                sender=LLM_0, epoch=1, outputs=(RequestOutput("r", 1, 0, b"abcd", FinishReason.STOP),)
            ),
            OUTPUTS,
        ),
    ):
        assert msgspec.msgpack.Decoder(UNIONS[edge]).decode(msgspec.msgpack.encode(message)) == message


def test_patterns() -> None:
    assert {edge.name for edge in EDGES if edge.pattern is Pattern.PUB_SUB} == {
        "steps",
        "outputs",
        "control",
        "orders",
    }


# Files that somebody removes.


def test_a_file_that_was_removed_is_bound_again(open_sockets: Callable[..., Sockets], tmp_path: Path) -> None:
    """Who is connected stays so, and who comes later finds it."""
    binder, before = open_sockets(), open_sockets().sender(ENCODE)
    receiver, publisher = binder.receiver(ENCODE), binder.publisher(CONTROL)
    subscriber = open_sockets().subscriber(CONTROL)
    assert len(wait_for_events(publisher, 1)) == 1
    before.send(released(1))
    assert receive(receiver).message == released(1)
    assert binder.bind_again() == []
    for path in list(tmp_path.iterdir()):
        path.unlink()
    late, late_subscriber = open_sockets().sender(ENCODE), open_sockets().subscriber(CONTROL)
    late.send(released(2))
    before.send(released(3))
    assert receive(receiver).message == released(3)
    assert sorted(binder.bind_again()) == [f"{tmp_path}/control", f"{tmp_path}/encode.0.1"]
    assert receive(receiver).message == released(2)
    assert len(wait_for_events(publisher, 1)) == 1
    publisher.publish(PipelineState(workers=()))
    for reader in (subscriber, late_subscriber):
        assert receive(reader).message == PipelineState(workers=())
    assert binder.bind_again() == []


async def test_so_is_an_asynchronous_receivers(open_sockets: Callable[..., Sockets], tmp_path: Path) -> None:
    binder = open_sockets()
    receiver = binder.async_receiver(INGEST)
    (tmp_path / "ingest.1").unlink()
    open_sockets().sender(INGEST).send(Hello(client_id=b"c" * 16, protocol=3))
    assert binder.bind_again() == [f"{tmp_path}/ingest.1"]
    received = await asyncio.wait_for(receiver.receive(), 5)
    assert isinstance(received.message, Hello)


def test_where_the_folder_is_gone_that_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    sockets = Sockets(folder, EPOCHS)
    sockets.receiver(STATUS)
    shutil.rmtree(folder)
    with pytest.raises(PipelineError, match="run/status was removed and cannot be made again"):
        sockets.bind_again()
    sockets.close()
