"""The tensors that are being read from other nodes: few at a time from each, the others wait. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.transport.tensors import TensorPool
from pipeline.wire.handles import TensorHandle

# From one node at a time: one is under way while the bytes of another are being written, and what waits in
# queues of sockets stays small.
MAX_UNDER_WAY = 4
RETRY_S = 5.0  # without a byte: a broken connection has lost the request or its reply


@dataclass(slots=True, eq=False)
class Read:
    """`source` is copied to `target`, a tensor of `pool`. `on_end` is called once, with whether it is there.

    Until then the memory of `target` may be written at any moment.
    """

    node: int
    source: TensorHandle
    pool: TensorPool
    target: TensorHandle
    on_end: Callable[[bool], None]
    num_read: int = 0  # bytes
    num_seen: int = 0  # bytes, when `tick` looked
    seen_at: float | None = None
    begun_at: float = 0.0


class Transport(Protocol):
    """What brings the bytes. It reports the end of a read by `Reads.end`."""

    kind: str

    def begin(self, number: int, read: Read) -> None: ...

    def forget(self, number: int) -> None:
        """Nobody waits for this read any more, and its target is not to be written."""


class Reads:
    """`choose` gives the transport for a pool of a node; `clock` is asked when reads begin and end. `epoch`
    is this carrier's: bytes that its predecessor asked for may still come."""

    def __init__(
        self, choose: Callable[[int, TensorHandle], Transport], clock: Callable[[], float], epoch: int = 0
    ) -> None:
        self._choose, self._clock = choose, clock
        self._waiting: dict[int, deque[Read]] = {}  # by node
        self._under_way: dict[int, tuple[Read, Transport]] = {}
        self._count: Counter[int] = Counter()  # of those under way, by node
        self._last_number = epoch << 32
        self.num_copies: Counter[str] = Counter()  # by transport
        self.num_bytes: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_lost = self.num_repeated = 0

    def begin(self, read: Read) -> None:
        self._waiting.setdefault(read.node, deque()).append(read)
        self._start(read.node)

    def _start(self, node: int) -> None:
        waiting = self._waiting.get(node)
        while waiting and self._count[node] < MAX_UNDER_WAY:
            read = waiting.popleft()
            read.begun_at = self._clock()
            self._count[node] += 1
            self._send(read)

    def _send(self, read: Read) -> None:
        self._last_number += 1
        number, transport = self._last_number, self._choose(read.node, read.source)
        read.num_read, read.num_seen, read.seen_at = 0, 0, None
        self._under_way[number] = read, transport
        transport.begin(number, read)

    def get(self, number: int) -> Read | None:
        found = self._under_way.get(number)
        return None if found is None else found[0]

    def end(self, number: int, is_there: bool) -> None:
        """A read has ended. An unknown number is ignored: the read was given up, or begun again."""
        if (found := self._under_way.pop(number, None)) is None:
            return
        read, transport = found
        self._count[read.node] -= 1
        if is_there:
            self.num_copies[transport.kind] += 1
            self.num_bytes[transport.kind] += read.source.nbytes
            self.seconds[transport.kind] += self._clock() - read.begun_at
        else:
            self.num_lost += 1
        self._start(read.node)
        read.on_end(is_there)

    def tick(self, now: float) -> None:
        """To be called about every second: begins reads again whose bytes do not come."""
        for number, (read, transport) in list(self._under_way.items()):
            if read.seen_at is None or read.num_read != read.num_seen:
                read.seen_at, read.num_seen = now, read.num_read
            elif now - read.seen_at > RETRY_S:
                transport.forget(number)
                del self._under_way[number]
                self.num_repeated += 1
                self._send(read)

    def give_up(self, node: int) -> None:
        """The carrier of a node has died: nothing comes from there."""
        for number, (read, transport) in list(self._under_way.items()):
            if read.node == node:
                transport.forget(number)
        lost = [number for number, (read, _) in self._under_way.items() if read.node == node]
        waiting = self._waiting.pop(node, deque())
        for number in lost:
            self.end(number, False)
        for read in waiting:
            self.num_lost += 1
            read.on_end(False)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def check_integrity(self) -> None:
        counted = Counter(read.node for read, _ in self._under_way.values())
        assert counted == +self._count, "reads are counted that are not under way"
        for node, waiting in self._waiting.items():
            assert not waiting or self._count[node] == MAX_UNDER_WAY, "a read waits for nobody"
