"""Lets messages from other nodes through to one worker of this node, if they are meant for its living
incarnation. Pure.

Within a node an address carries the epoch of its worker, so that what was sent to a dead worker never reaches
its successor. A carrier's address outlives the workers behind it. So each sender begins with `PoolOpened`,
which says which incarnation all that follows is meant for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from pipeline.wire.base import PoolOpened, WorkerMessage
from pipeline.wire.topology import WorkerId

M = TypeVar("M", bound=WorkerMessage)


class _Held(NamedTuple, Generic[M]):
    receiver_epoch: int
    message: M


class Gate(Generic[M]):
    """`epoch_of` gives the last known epoch of a worker. `on_dropped` is called with what a living sender
    meant for a dead receiver."""

    def __init__(
        self, receiver: WorkerId, epoch_of: Callable[[WorkerId], int],
        on_dropped: Callable[[M], None] = lambda message: None,
    ) -> None:  # fmt: skip
        self._receiver, self._epoch_of, self._on_dropped = receiver, epoch_of, on_dropped
        self._meant: dict[tuple[WorkerId, int], int] = {}  # by sender and its epoch: the receiver's epoch
        self._held: list[_Held[M]] = []  # for an incarnation that is not known here yet
        self.num_stale = 0

    def admit(self, message: M | PoolOpened) -> M | None:
        """The message, if it may go on now."""
        sender = message.sender, message.epoch
        if message.epoch < self._epoch_of(message.sender):
            self.num_stale += 1
            return None
        if isinstance(message, PoolOpened):
            self._meant[sender] = message.receiver_epoch
            return None
        meant, epoch = self._meant.get(sender, -1), self._epoch_of(self._receiver)
        if meant < epoch:
            self._drop(message)
            return None
        if meant > epoch:
            self._held.append(_Held(meant, message))
            return None
        return message

    def _drop(self, message: M) -> None:
        self.num_stale += 1
        self._on_dropped(message)

    def on_death(self, worker: WorkerId, epoch: int) -> list[M]:
        """A sender or the receiver has died; `epoch` is its successor's. Returns what may go on now."""
        self._meant = {
            sender: meant
            for sender, meant in self._meant.items()
            if sender[0] != worker or sender[1] >= epoch
        }
        self._held = [
            held for held in self._held if held.message.sender != worker or held.message.epoch >= epoch
        ]
        if worker != self._receiver:
            return []
        for held in self._held:
            if held.receiver_epoch < epoch:
                self._drop(held.message)
        passed = [held.message for held in self._held if held.receiver_epoch == epoch]
        self._held = [held for held in self._held if held.receiver_epoch > epoch]
        return passed
