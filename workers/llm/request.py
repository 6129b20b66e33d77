"""A request inside the engine: its tokens, its embeddings as they come in, how far it is computed.

This is the mutable object; on the wire it was a `GenerateRequest`, and the conversion is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.messages import EmbeddingSlice, GenerateRequest, GridTHW, Int32Array, MmChunk, MmItem, unpack_int32
from pipeline.sampling import FinishReason, SamplingParams
from pipeline.tensors import TensorHandle


class Lease(NamedTuple):
    vit: int
    lease_id: int


@dataclass(slots=True)
class Chunk:
    """Placeholders [offset, offset + num_tokens) of the prompt, filled by one embedding."""

    item: int
    index: int
    offset: int
    wire: MmChunk
    embeddings: TensorHandle | None = None
    lease: Lease | None = None
    is_read: bool = False  # every rank has gathered all of it

    @property
    def stop(self) -> int:
        return self.offset + self.wire.num_tokens


@dataclass(slots=True)
class Request:
    client_id: bytes
    request_id: str
    attempt: int
    arrival: int
    prompt_token_ids: list[int]
    positions: Int32Array  # [3, prompt]
    position_delta: int  # what a token after the prompt adds to its index
    chunks: list[Chunk]
    mm_hashes: tuple[bytes, ...]
    sampling: SamplingParams
    max_tokens: int
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @classmethod
    def from_wire(cls, message: GenerateRequest, merge_size: int, max_model_len: int) -> Request:
        prompt = unpack_int32(message.prompt_token_ids).tolist()
        positions, delta = mrope_positions(len(prompt), message.items, merge_size)
        chunks: list[Chunk] = []
        for number, item in enumerate(message.items):
            offset = item.offset
            for index, wire in enumerate(item.chunks):
                chunks.append(Chunk(number, index, offset, wire))
                offset += wire.num_tokens
        room = max_model_len - len(prompt)
        asked = message.sampling.max_tokens
        return cls(
            client_id=message.client_id, request_id=message.request_id, attempt=message.attempt, arrival=message.arrival,
            prompt_token_ids=prompt, positions=positions, position_delta=delta, chunks=chunks,
            mm_hashes=tuple(item.mm_hash for item in message.items), sampling=message.sampling,
            max_tokens=room if asked is None else min(asked, room),
            output_token_ids=unpack_int32(message.output_token_ids).tolist(),
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.max_tokens

    def num_ready_tokens(self) -> int:
        """Tokens from the start that can be computed: up to the first placeholder whose embedding has not arrived."""
        for chunk in self.chunks:
            if chunk.embeddings is None and not chunk.is_read:
                return chunk.offset
        return self.num_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]

    def positions_of(self, start: int, stop: int) -> Int32Array:
        """M-RoPE positions [3, stop - start]; behind the prompt all three rows are the index plus the delta."""
        prompt = len(self.prompt_token_ids)
        behind = np.arange(max(start, prompt), max(stop, prompt), dtype=np.int32) + np.int32(self.position_delta)
        return np.concatenate([self.positions[:, start:stop], np.broadcast_to(behind, (3, len(behind)))], axis=1)

    def embedding_slices(self, start: int, stop: int) -> tuple[EmbeddingSlice, ...]:
        """The parts of embeddings that tokens [start, stop) take the place of."""
        slices: list[EmbeddingSlice] = []
        for chunk in self.chunks:
            first, last = max(start, chunk.offset), min(stop, chunk.stop)
            if first < last:
                assert chunk.embeddings is not None
                slices.append(EmbeddingSlice(chunk.embeddings, first - chunk.offset, first - start, last - first))
        return tuple(slices)

    def take_read_leases(self) -> list[Lease]:
        """Leases of the chunks that have been computed by now: each is handed out once."""
        done: list[Lease] = []
        for chunk in self.chunks:
            if chunk.lease is not None and chunk.stop <= self.num_computed_tokens:
                chunk.is_read = True
                done.append(chunk.lease)
                chunk.lease = chunk.embeddings = None
        return done

    def take_all_leases(self) -> list[Lease]:
        leases = [chunk.lease for chunk in self.chunks if chunk.lease is not None]
        for chunk in self.chunks:
            chunk.lease = chunk.embeddings = None
        return leases


def mrope_positions(num_tokens: int, items: Sequence[MmItem], merge_size: int) -> tuple[Int32Array, int]:
    """Positions [3, num_tokens] (time, height, width) of a prompt, and the delta for what comes after (Qwen2-VL, Wang et al. 2024).

    Text counts on by one in all three rows. An item starts where the text before it ended, spans its grid in three
    dimensions, and the text behind it goes on after the largest position in it.
    """
    positions = np.empty((3, num_tokens), dtype=np.int32)
    index, position = 0, 0
    for item in items:
        text = item.offset - index
        positions[:, index : item.offset] = np.arange(position, position + text)
        start = position + text
        grid = GridTHW(item.grid_thw.t, item.grid_thw.h // merge_size, item.grid_thw.w // merge_size)
        axes: npt.NDArray[np.int64] = np.indices(tuple(grid)).reshape(3, -1)
        positions[:, item.offset : item.offset + item.length] = axes + start
        index, position = item.offset + item.length, start + max(grid)
    positions[:, index:] = np.arange(position, position + num_tokens - index)
    end = position + num_tokens - index
    return positions, end - num_tokens
