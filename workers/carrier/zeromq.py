"""Reads by messages: the carrier of the other node sends the bytes in pieces. This works everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.transport.ends import Sink
from pipeline.wire.base import Origin
from pipeline.wire.carrying import CarryMessage, ReadReply, ReadRequest
from workers.carrier.reads import Read, Reads


class ZeromqTransport:
    kind = "zeromq"

    def __init__(self, origin: Origin, peers: Mapping[int, Sink[CarryMessage]]) -> None:
        self._origin, self._peers = origin, peers

    def begin(self, number: int, read: Read) -> None:
        self._peers[read.node].send(ReadRequest(number=number, source=read.source, **self._origin))

    def forget(self, number: int) -> None:
        """Nothing to do: pieces with a number that is not awaited are dropped."""


def take_piece(reads: Reads, message: ReadReply, frames: Sequence[memoryview]) -> None:
    """Writes a piece to its place. A piece behind a gap is dropped: the read begins again."""
    read = reads.get(message.number)
    if read is None:
        return
    if message.is_stale:
        reads.end(message.number, False)
        return
    if message.start != read.num_read or len(frames) != 1:
        return
    read.pool.write(read.target, message.start, frames[0])
    read.num_read += len(frames[0])
    if message.is_last:
        reads.end(message.number, read.num_read == read.target.nbytes)
