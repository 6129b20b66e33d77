"""A carrier without its process: messages in, reads, messages out.

What comes from other nodes for a worker of this node passes a gate; what holds a tensor is read first, and
everything else goes on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from pipeline.wire.base import PoolOpened, WorkerMessage
from pipeline.wire.carrying import CarryMessage, MemoryShared, OldestAwaited, ReadReply, ReadRequest
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import (
    CancelEncode,
    EncodeMessage,
    EncodeMiss,
    EncodeRequest,
    LeaseReleased,
    LeaseRequest,
    LeaseSet,
    PixelsReleased,
)
from pipeline.wire.generation import EmbeddingReady, EncodeFailed, LeaseRefused, LlmMessage
from pipeline.wire.topology import Role, WorkerId
from workers.carrier.embeddings import EmbeddingCopies
from workers.carrier.gates import Gate
from workers.carrier.pixels import PixelCopies
from workers.carrier.reads import Reads
from workers.carrier.source import PieceSource
from workers.carrier.transports import Transports
from workers.carrier.zeromq import take_piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """`pixels` is None on the head, where preprocess is near; `embeddings` on a node without LLM groups."""

    reads: Reads
    source: PieceSource
    transports: Transports
    pixels: PixelCopies | None
    embeddings: EmbeddingCopies | None


class CarrierCore:
    """`epoch_of` gives the last known epoch of a worker. `vits`: the ViTs of this node that preprocess
    reaches through this carrier, by index; `leads`: those of its groups."""

    def __init__(
        self, epoch_of: Callable[[WorkerId], int], parts: Parts, vits: Sequence[int], leads: Sequence[int],
    ) -> None:  # fmt: skip
        self._epoch_of = epoch_of
        self.pixels, self.embeddings = parts.pixels, parts.embeddings
        self.reads, self.source, self.transports = parts.reads, parts.source, parts.transports
        self._vit_gates: Mapping[int, Gate[EncodeRequest | CancelEncode]] = {
            vit: Gate(WorkerId(Role.VIT, vit), epoch_of) for vit in vits
        }
        self._lead_gates: Mapping[int, Gate[EmbeddingReady | EncodeFailed | LeaseRefused]] = {
            lead: Gate(WorkerId(Role.LLM, lead), epoch_of, self._release) for lead in leads
        }
        self._num_stale = self.num_misplaced = 0

    @property
    def num_stale(self) -> int:
        of_vits = sum(gate.num_stale for gate in self._vit_gates.values())
        return self._num_stale + of_vits + sum(gate.num_stale for gate in self._lead_gates.values())

    def start(self) -> None:
        """Announces the pools, before any handle of them."""
        if self.pixels is not None:
            for vit in self._vit_gates:
                self.pixels.announce_to(vit)
        if self.embeddings is not None:
            for lead in self._lead_gates:
                self.embeddings.announce_to(lead)
        self.transports.start()

    def _is_current(self, message: WorkerMessage) -> bool:
        return message.epoch >= self._epoch_of(message.sender)

    # From other nodes, for workers of this node.

    def on_encode(self, vit: int, message: EncodeMessage) -> None:
        """From preprocess, for a ViT of this node."""
        match message:
            case EncodeRequest() | CancelEncode() | PoolOpened():
                if (admitted := self._vit_gates[vit].admit(message)) is not None:
                    self._pass_on_to_vit(vit, admitted)
            case LeaseReleased() | LeaseSet() | LeaseRequest():
                self.num_misplaced += 1  # they go to the ViT's own address
            case _:
                assert_never(message)

    def _pass_on_to_vit(self, vit: int, message: EncodeRequest | CancelEncode) -> None:
        assert self.pixels is not None
        match message:
            case EncodeRequest():
                self.pixels.on_request(vit, message)
            case CancelEncode():
                self.pixels.on_cancel(vit, message)
            case _:
                assert_never(message)

    def on_llm(self, lead: int, message: LlmMessage) -> None:
        """From a ViT of another node, for a group of this node."""
        match message:
            case EmbeddingReady() | EncodeFailed() | LeaseRefused() | PoolOpened():
                if (admitted := self._lead_gates[lead].admit(message)) is not None:
                    self._pass_on_to_lead(admitted)
            case _:  # preprocess reaches leads of other nodes directly
                self.num_misplaced += 1

    def _release(self, message: EmbeddingReady | EncodeFailed | LeaseRefused) -> None:
        """It was meant for a dead group: its ViT may take its lease back."""
        if isinstance(message, EmbeddingReady) and self.embeddings is not None:
            self.embeddings.release(message)

    def _pass_on_to_lead(self, message: EmbeddingReady | EncodeFailed | LeaseRefused) -> None:
        assert self.embeddings is not None
        match message:
            case EmbeddingReady():
                self.embeddings.on_ready(message)
            case EncodeFailed() | LeaseRefused():
                self.embeddings.pass_on(message)
            case _:
                assert_never(message)

    # From workers of this node.

    def on_carry(self, message: CarryMessage, frames: Sequence[memoryview] = ()) -> None:
        """From a worker of this node, or from the carrier of another."""
        if not self._is_current(message):
            self._num_stale += 1
            return
        match message:
            case PoolOpened():
                self.transports.withdraw(message.pool.pool_id, message.pool.epoch)
                self.source.open(message.pool)
                self.transports.share(message.pool)
            case ReadRequest():
                self.source.on_request(message)
            case ReadReply():
                take_piece(self.reads, message, frames)
            case MemoryShared():
                self.transports.on_shared(message)
            case PixelsReleased() | EncodeMiss():
                if self.pixels is not None:
                    self.pixels.on_feedback(message)
            case LeaseReleased() | LeaseSet():
                if self.embeddings is not None:
                    self.embeddings.on_released(message)
            case OldestAwaited(order=order):
                if self.embeddings is not None:
                    self.embeddings.on_awaited(message.sender.rank, order)
            case _:
                assert_never(message)

    # From the launcher.

    def on_death(self, successor: WorkerState) -> None:
        worker, epoch = successor.worker, successor.epoch
        match worker.role:
            case Role.PREPROCESS:
                self._on_source_death(worker, epoch)
                if self.pixels is not None:
                    self.pixels.on_preprocess_death()
            case Role.VIT:
                self._on_source_death(worker, epoch)
                if worker.rank in self._vit_gates and self.pixels is not None:
                    self.pixels.on_vit_death(worker.rank)
                if self.embeddings is not None:
                    self.embeddings.on_vit_death(worker)
            case Role.LLM:
                if worker.rank in self._lead_gates and self.embeddings is not None:
                    self.embeddings.on_group_death(worker.rank)
            case Role.CARRIER:
                self.source.on_reader_death(worker, epoch)
                self.transports.on_death(worker.rank)
                self.reads.give_up(worker.rank)
        self._open_gates(worker, epoch)

    def _on_source_death(self, worker: WorkerId, epoch: int) -> None:
        self.transports.withdraw(str(worker), epoch)
        self.source.on_owner_death(worker, epoch)

    def _open_gates(self, worker: WorkerId, epoch: int) -> None:
        for vit, vit_gate in self._vit_gates.items():
            for passed in vit_gate.on_death(worker, epoch):
                self._pass_on_to_vit(vit, passed)
        for lead_gate in self._lead_gates.values():
            for message in lead_gate.on_death(worker, epoch):
                self._pass_on_to_lead(message)

    # The loop.

    def work(self) -> bool:
        """A piece for another node, and what transports have done meanwhile. False: there is nothing."""
        has_moved = self.transports.poll()
        return self.source.send_piece() or has_moved

    def tick(self, now: float) -> None:
        """To be called every second."""
        self.reads.tick(now)
        if self.embeddings is not None:
            self.embeddings.send_sets()
        self.check_integrity()

    def check_integrity(self) -> None:
        self.reads.check_integrity()
        if self.pixels is not None:
            self.pixels.check_integrity()
        if self.embeddings is not None:
            self.embeddings.check_integrity()
