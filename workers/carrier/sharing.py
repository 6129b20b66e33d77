"""What a transport offers that reads the registered memory of another node by itself."""

from __future__ import annotations

from typing import Protocol

from pipeline.wire.carrying import SharedPool
from pipeline.wire.handles import PoolInfo, TensorHandle
from workers.carrier.reads import Read


class SharingTransport(Protocol):
    """A `Transport`. A pool is read only when the pattern behind it has arrived once."""

    kind: str

    def begin(self, number: int, read: Read) -> None: ...

    def forget(self, number: int) -> None: ...

    def register(self, info: PoolInfo) -> bool:
        """Makes a mapped pool of this node readable. False where it cannot be."""

    def withdraw(self, pool_id: str, epoch: int) -> bool:
        """Ends that for epochs before this one. Whether anything was registered."""

    def offer(self) -> tuple[bytes, tuple[SharedPool, ...]]:
        """What another node needs to know."""

    def on_offer(self, node: int, agent: bytes, pools: tuple[SharedPool, ...]) -> None: ...

    def forget_node(self, node: int) -> None: ...

    def can_read(self, node: int, source: TensorHandle) -> bool: ...

    def is_proven(self, node: int) -> bool:
        """Whether a pattern of this node has arrived."""

    def poll(self) -> bool: ...

    @property
    def is_busy(self) -> bool: ...
