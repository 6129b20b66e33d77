"""Structs that the messages of several edges share.

Messages are MessagePack maps with a `type` field; unknown fields are refused. They hold no tensors, only
`TensorHandle`s. A worker's message names its sender and the sender's epoch.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import msgspec

from pipeline.wire.handles import PoolInfo
from pipeline.wire.topology import WorkerId


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


class WorkerMessage(Message, frozen=True, kw_only=True):
    sender: WorkerId
    epoch: int


class Origin(TypedDict):
    """The fields that a worker puts into each of its messages."""

    sender: WorkerId
    epoch: int


class ChunkKey(NamedTuple):
    """One encode: a chunk of an item (picture, part of a video) of one attempt of a request."""

    request_id: str
    attempt: int
    item: int
    chunk: int
    lead: int = 0  # the LLM rank that runs the request, or leads the group that does


class Order(NamedTuple):
    """Position in the global order: requests as the LLM admits them, then a request's items by position."""

    arrival: int
    position: int


class GridTHW(NamedTuple):
    """Patches of an item: time, height, width."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w


class PoolOpened(WorkerMessage, frozen=True, kw_only=True):
    """The sender's pool, once, before any handle of it.

    Between nodes it only begins what the sender says to this incarnation of the receiver: the carrier that
    passes it on drops what is meant for a dead one.
    """

    pool: PoolInfo
    receiver_epoch: int = 0  # the incarnation that is meant, where it travels between nodes


class PoolClosed(WorkerMessage, frozen=True, kw_only=True):
    """The pool of a dead worker is mapped here no longer.

    From llm rank 0 to the ranks: close it, behind the steps before this.
    """

    pool_id: str
    pool_epoch: int
