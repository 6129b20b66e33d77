"""Messages to the carriers, which copy tensors between nodes: the edge carry."""

from __future__ import annotations

import msgspec

from pipeline.wire.base import Order, PoolOpened, WorkerMessage
from pipeline.wire.encoding import EncodeMiss, LeaseReleased, LeaseSet, PixelsReleased
from pipeline.wire.handles import TensorHandle


class OldestAwaited(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → the carrier of its node: of the embeddings that I wait for, this chunk is the oldest.

    It alone may use the reserve of the carrier's pool, with the chunks before it.
    """

    order: Order | None  # None: I wait for none


class ReadRequest(WorkerMessage, frozen=True, kw_only=True):
    """carrier → carrier: send me this tensor of a pool on your node."""

    number: int  # of the reader's; the replies name it
    source: TensorHandle


class ReadReply(WorkerMessage, frozen=True, kw_only=True):
    """carrier → carrier: a piece of a tensor. Its bytes are the only frame behind the message.

    The pieces come in order. With the last one the handle was checked again, behind the reading.
    """

    number: int
    start: int  # of the piece, in bytes
    is_last: bool
    is_stale: bool = False  # the handle is not, or no longer, valid: what was sent is to be dropped


class SharedPool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a pool lies in the memory that its node's carrier has registered with NIXL."""

    pool_id: str
    epoch: int
    address: int
    nbytes: int
    table_address: int  # of the slots' generations: int64 [max_slots]
    max_slots: int
    pattern: bytes  # stands in memory directly behind the `nbytes`


class MemoryShared(WorkerMessage, frozen=True, kw_only=True):
    """carrier → carrier: this memory of my node you may read by NIXL. Each replaces the one before."""

    agent: bytes  # metadata of NIXL's agent
    pools: tuple[SharedPool, ...]


# carry.<n>: other carriers, and the workers of node n → carrier n
CarryMessage = (
    PoolOpened
    | PixelsReleased
    | EncodeMiss
    | LeaseReleased
    | LeaseSet
    | OldestAwaited
    | ReadRequest
    | ReadReply
    | MemoryShared
)
