"""The places of a prompt's picture and video embeddings, and which embeddings have arrived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.wire.generation import MmChunk, MmItem
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import WorkerId


class Lease(NamedTuple):
    owner: WorkerId  # of the pool: a ViT, or the carrier that has copied the embeddings to this node
    epoch: int
    lease_id: int


class ChunkRun(NamedTuple):
    """Placeholders [offset, stop) of a prompt, filled by consecutive rows of an embedding from `row` on."""

    offset: int
    stop: int
    row: int


@dataclass(slots=True)
class Chunk:
    """Placeholders of the prompt, filled by one embedding: its rows go to one run of tokens or to several."""

    item: int
    index: int
    pieces: tuple[ChunkRun, ...]  # in the order of the prompt, at least one
    wire: MmChunk
    embeddings: TensorHandle | None = None
    lease: Lease | None = None
    # No longer needed: gathered by every rank, or covered by the prefix cache.
    is_read: bool = False
    is_lost: bool = False  # its lease was released, but it is needed again after a preemption
    was_encoded: bool = False  # by a ViT since the request came: after a preemption it is in the ViT's cache
    is_kept: bool = False  # its lease is not released when it is read: other choices of the request need it

    @property
    def stop(self) -> int:
        """The first token after the chunk's last placeholder."""
        return self.pieces[-1].stop

    @property
    def is_awaited(self) -> bool:
        """Its embeddings are under way. Embeddings lost in a preemption are requested later."""
        return self.embeddings is None and not self.is_read and not self.is_lost


def chunks_of(number: int, item: MmItem) -> list[Chunk]:
    """The chunks of an item, laid over its spans in order.

    One chunk may fill several spans, one span may take several chunks.
    """
    num_placeholders = sum(span.length for span in item.spans)
    num_rows = sum(wire.num_tokens for wire in item.chunks)
    assert num_rows == num_placeholders, f"item {number}: {num_rows} rows, {num_placeholders} placeholders"
    chunks: list[Chunk] = []
    spans = iter(item.spans)
    offset = stop = 0  # the unfilled rest of the span
    for index, wire in enumerate(item.chunks):
        pieces: list[ChunkRun] = []
        row = 0
        while row < wire.num_tokens:
            if offset == stop:
                span = next(spans)
                offset, stop = span.offset, span.stop
            length = min(stop - offset, wire.num_tokens - row)
            pieces.append(ChunkRun(offset, offset + length, row))
            offset += length
            row += length
        chunks.append(Chunk(number, index, tuple(pieces), wire))
    return chunks
