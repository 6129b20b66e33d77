"""The other side of reads: sends tensors of this node's pools to carriers of other nodes, piece by piece.

Each piece is copied out of the pool, and its handle checked before and behind, so that nothing is sent that
was written meanwhile. Readers take turns, a piece each.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.transport.ends import Sink
from pipeline.transport.tensors import PoolGoneError, StaleHandleError
from pipeline.wire.base import Origin
from pipeline.wire.carrying import CarryMessage, ReadReply, ReadRequest
from pipeline.wire.handles import PoolInfo, TensorHandle
from pipeline.wire.topology import WorkerId, parse_worker

# Large enough that its message costs little, small enough that both sides copy while the next is under way.
PIECE_BYTES = 512 << 10


class ReadablePools(Protocol):
    """`PoolMap`, of pools on the host or on GPUs."""

    def open(self, info: PoolInfo) -> None: ...

    def close(self, pool_id: str) -> None: ...

    def knows(self, pool_id: str, epoch: int) -> bool: ...

    def read(self, handle: TensorHandle, start: int, nbytes: int) -> bytes: ...


@dataclass(slots=True, eq=False)
class _Sending:
    request: ReadRequest
    start: int = 0  # of the next piece


class PieceSource:
    """`peers`: the sinks to the carriers of other nodes."""

    def __init__(
        self, origin: Origin, pools: ReadablePools, peers: Mapping[int, Sink[CarryMessage]],
        epoch_of: Callable[[WorkerId], int],
    ) -> None:  # fmt: skip
        self._origin, self._pools, self._peers, self._epoch_of = origin, pools, peers, epoch_of
        self._sending: deque[_Sending] = deque()
        self._early: list[ReadRequest] = []  # of pools that are not announced yet
        self.num_bytes = 0

    def open(self, info: PoolInfo) -> None:
        if self._pools.knows(info.pool_id, info.epoch):
            return
        with contextlib.suppress(PoolGoneError):  # its successor will announce another
            self._pools.open(info)
        early, self._early = self._early, []
        for request in early:
            self.on_request(request)

    def on_request(self, request: ReadRequest) -> None:
        handle = request.source
        if self._pools.knows(handle.pool_id, handle.epoch):
            self._sending.append(_Sending(request))
        elif handle.epoch < self._epoch_of(parse_worker(handle.pool_id)):
            self._tell_stale(request)
        else:
            self._early.append(request)

    def _tell_stale(self, request: ReadRequest) -> None:
        reply = ReadReply(number=request.number, start=0, is_last=True, is_stale=True, **self._origin)
        self._peers[request.sender.rank].send(reply, (b"",))

    def send_piece(self) -> bool:
        """Sends the next piece of the reader whose turn it is. False: there is none."""
        if not self._sending:
            return False
        sending = self._sending.popleft()
        request, start = sending.request, sending.start
        try:
            piece = self._pools.read(request.source, start, PIECE_BYTES)
        except StaleHandleError:
            self._tell_stale(request)
            return True
        sending.start += len(piece)
        self.num_bytes += len(piece)
        is_last = sending.start >= request.source.nbytes
        reply = ReadReply(number=request.number, start=start, is_last=is_last, **self._origin)
        self._peers[request.sender.rank].send(reply, (piece,))
        if not is_last:
            self._sending.append(sending)
        return True

    def on_owner_death(self, owner: WorkerId, epoch: int) -> None:
        """Closes its pool, unless it is that of its successor, whose epoch this is."""
        if not self._pools.knows(str(owner), epoch):
            self._pools.close(str(owner))
        early, self._early = self._early, []
        for request in early:
            self.on_request(request)

    def on_reader_death(self, carrier: WorkerId, epoch: int) -> None:
        def is_alive(request: ReadRequest) -> bool:
            return request.sender != carrier or request.epoch >= epoch

        self._early = [request for request in self._early if is_alive(request)]
        self._sending = deque(sending for sending in self._sending if is_alive(sending.request))
