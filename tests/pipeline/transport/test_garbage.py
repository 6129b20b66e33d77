"""Bytes from outside: whatever a decoder raises, the message is refused and counted; nothing dies of it."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.transport.ends import MAX_FRAMES, MAX_GARBAGE, _Decoding
from pipeline.transport.sockets import UNIONS, Sockets
from pipeline.wire.clients import Hello
from pipeline.wire.errors import RequestError, shown
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import EDGES, INGEST, Edge, Pattern, WorkerId, address
from tests.fakes import PREPROCESS

PULL_EDGES = [edge for edge in EDGES if edge.pattern is Pattern.PUSH_PULL]
HELLO = Hello(client_id=b"c" * 16, protocol=3)
DEEP = 3000  # levels: far more than Python's stack has, in a few kilobytes


def members(union: Any) -> tuple[Any, ...]:
    """An edge may carry one kind of message only."""
    return get_args(union) or (union,)


def members_of(union: Any) -> list[str]:
    """The tags of an edge's messages."""
    return [member.__name__ for member in members(union)]


def tagged(tag: str, field: str, value: bytes) -> bytes:
    """A message of two fields, `type` and another."""
    return b"\x82" + b"".join(map(msgspec.msgpack.encode, ("type", tag, field))) + value


def nested(edge: Edge) -> list[bytes]:
    """Maps and arrays nested beyond reason: bare, before the type is known, in known and unknown fields."""
    maps, arrays = b"\x81\xa1a" * DEEP + b"\xc0", b"\x91" * DEEP + b"\xc0"
    wide = b"\xdd" + (DEEP).to_bytes(4, "big") + b"\x91" * DEEP
    found = [maps, arrays, wide]
    for value in (maps, arrays):
        head, tail = (b"".join(map(msgspec.msgpack.encode, pair)) for pair in (("a",), ("type", "Hello")))
        found.append(b"\x82" + head + value + tail)
        for member in members(UNIONS[edge]):
            fields = ("a", *member.__struct_fields__)
            found += [tagged(member.__name__, field, value) for field in fields]
    return found


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.name)
def test_deep_nesting_is_refused_and_counted_on_every_edge(edge: Edge) -> None:
    decoding = _Decoding[Any](UNIONS[edge])
    messages = nested(edge)
    assert [decoding.decode([zmq.Frame(data)]) for data in messages] == [None] * len(messages)
    assert decoding.num_refused == len(messages)


@pytest.mark.parametrize("error", [RecursionError, MemoryError, SystemError, RequestError("no")])
def test_whatever_a_decoder_raises_is_refused_and_counted(error: Any) -> None:
    class Raises:
        def decode(self, data: object) -> None:
            raise error

    decoding = _Decoding[Any](UNIONS[INGEST])
    decoding._decoder = Raises()  # type: ignore[assignment]
    assert decoding.decode([zmq.Frame(b"x")]) is None
    assert decoding.num_refused == 1


@pytest.mark.parametrize("num_frames", [0, MAX_FRAMES + 1])
def test_no_frame_and_too_many_are_refused(num_frames: int) -> None:
    decoding = _Decoding[Any](UNIONS[INGEST])
    assert decoding.decode([zmq.Frame(msgspec.msgpack.encode(HELLO))] * num_frames) is None
    assert decoding.num_refused == 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_bytes_never_raise(data: st.DataObject) -> None:
    """Bare, and behind the head of a real message, where a decoder gets further."""
    edge = data.draw(st.sampled_from(EDGES))
    tail = data.draw(st.binary(max_size=200))
    tag = data.draw(st.sampled_from(members_of(UNIONS[edge])))
    for message in (tail, tagged(tag, "sender", tail), tagged(tag, "client_id", tail)):
        decoding = _Decoding[Any](UNIONS[edge])
        received = decoding.decode([zmq.Frame(message)])
        assert (received is None) == (decoding.num_refused == 1)


@pytest.mark.parametrize("edge", PULL_EDGES, ids=lambda edge: edge.name)
def test_every_receiver_gets_what_follows_deep_nesting(edge: Edge, tmp_path: Path) -> None:
    """Over sockets, with the receivers that workers have: both kinds."""
    epochs = {WorkerId(edge.binder): 1}
    garbage = nested(edge)[:2]

    async def receive(sockets: Sockets) -> int:
        receiver = sockets.async_receiver(edge)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receiver.receive(), 0.3)
        return receiver.num_refused

    def poll(sockets: Sockets) -> int:
        receiver = sockets.receiver(edge)
        while receiver.num_refused < len(garbage) and receiver.socket.poll(5000):
            assert receiver.receive() is None
        return receiver.num_refused

    for read in (poll, lambda sockets: asyncio.run(receive(sockets))):
        sockets = Sockets(tmp_path, epochs)
        try:
            with zmq.Context() as context, context.socket(zmq.PUSH) as raw:
                raw.setsockopt(zmq.LINGER, 5000)
                raw.connect(address(tmp_path, edge, epochs))
                for message in garbage:
                    raw.send(message)
                assert read(sockets) == len(garbage)
        finally:
            sockets.close()


@pytest.mark.parametrize("message", [b"\x91" * DEEP, msgspec.msgpack.encode(HELLO)], ids=["bad", "good"])
async def test_other_tasks_run_beside_a_flood(message: bytes, tmp_path: Path) -> None:
    epochs = {PREPROCESS: 1}
    sockets = Sockets(tmp_path, epochs)
    receiver = sockets.async_receiver(INGEST)

    async def read() -> None:
        while True:
            await receiver.receive()

    with closing(sockets), zmq.Context() as context, context.socket(zmq.PUSH) as raw:
        raw.setsockopt(zmq.SNDHWM, 0)
        raw.setsockopt(zmq.LINGER, 0)
        raw.connect(address(tmp_path, INGEST, epochs))
        num_messages = 200 * MAX_GARBAGE
        for _ in range(num_messages):
            raw.send(message)
        await asyncio.sleep(0.2)  # until all have come in
        reading = asyncio.create_task(read())
        for _ in range(100):
            await asyncio.sleep(0)
        reading.cancel()
        assert receiver._num_received < num_messages, "the flood came first, and only then the other task"


def test_a_value_in_an_error_is_short_whatever_it_is() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    many = {str(number): number for number in range(10_000)}
    for value in ("x" * 10_000, b"x" * 10_000, 10**5000, -(10**400), deep, [1] * 10_000, many):
        assert len(shown(value)) <= 160
    assert (shown(0.5), shown("a"), shown(None)) == ("0.5", "'a'", "None")
    with pytest.raises(RequestError) as caught:
        SamplingParams(top_k=10**5000)
    assert len(str(caught.value)) < 200
