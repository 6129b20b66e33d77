from __future__ import annotations

import msgspec
import numpy as np

from pipeline.wire.generation import GenerateRequest, MmChunk, MmItem, Span
from pipeline.wire.handles import TensorHandle
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role, WorkerId
from workers.llm.chunk import Lease, chunks_of
from workers.llm.request import Request


def item(offset: int, length: int) -> MmItem:
    return MmItem((Span(offset, length),), b"hash", b"hash", (MmChunk(b"hash", length, 0, 1),))


def request(
    num_tokens: int, items: tuple[MmItem, ...] = (), max_tokens: int | None = 8, max_model_len: int = 1000
) -> Request:
    message = GenerateRequest(
        sender=WorkerId(Role.PREPROCESS),
        epoch=1,
        client_id=b"c" * 16,
        request_id="r",
        attempt=1,
        arrival=1,
        prompt_token_ids=pack_int32(range(num_tokens)),
        positions=np.arange(3 * num_tokens, dtype=np.int32).tobytes(),
        position_delta=-3,
        items=items,
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    return Request.from_wire(message, max_model_len)


def handle(rows: int) -> TensorHandle:
    return TensorHandle("vit.0", 1, 0, 1, 0, (rows, 8), "float32")


def test_prefill_may_go_up_to_the_first_missing_embedding() -> None:
    made = request(30, (item(3, 4), item(10, 8)))
    assert made.num_ready_tokens() == 3
    made.chunks[1].embeddings = handle(8)
    assert made.num_ready_tokens() == 3
    made.chunks[0].embeddings = handle(4)
    assert made.num_ready_tokens() == 30


def test_embeddings_are_cut_to_the_chunk_of_the_step() -> None:
    made = request(30, (item(3, 4), item(10, 8)))
    for chunk in made.chunks:
        chunk.embeddings = handle(chunk.wire.num_tokens)
    slices = made.embedding_slices(5, 14)
    assert [(part.start, part.offset, part.length) for part in slices] == [(2, 0, 2), (0, 5, 4)]
    assert made.embedding_slices(7, 10) == ()


def two_runs(*lengths: int) -> MmItem:
    """Runs of 4 and 6 placeholders with text between, in chunks of so many tokens."""
    chunks = tuple(MmChunk(bytes([number]), length, 0, 1) for number, length in enumerate(lengths))
    return MmItem((Span(3, 4), Span(9, 6)), b"hash", b"hash", chunks)


def test_chunks_are_laid_over_the_runs_of_an_item() -> None:
    def pieces(*lengths: int) -> list[list[tuple[int, int, int]]]:
        return [[tuple(piece) for piece in chunk.pieces] for chunk in chunks_of(0, two_runs(*lengths))]

    assert pieces(10) == [[(3, 7, 0), (9, 15, 4)]]
    assert pieces(4, 6) == [[(3, 7, 0)], [(9, 15, 0)]]
    assert pieces(7, 3) == [[(3, 7, 0), (9, 12, 4)], [(12, 15, 0)]]
    assert pieces(1, 1, 8) == [[(3, 4, 0)], [(4, 5, 0)], [(5, 7, 0), (9, 15, 2)]]


def test_every_row_of_an_embedding_goes_to_its_place_in_any_cut() -> None:
    for lengths in ((10,), (4, 6), (7, 3), (1, 1, 8)):
        made = request(20, (two_runs(*lengths),))
        for chunk in made.chunks:
            chunk.embeddings = msgspec.structs.replace(handle(chunk.wire.num_tokens), slot=chunk.index)
        expected = [(number, row) for number, length in enumerate(lengths) for row in range(length)]
        places = [*range(3, 7), *range(9, 15)]
        for size in (1, 2, 3, 7, 20):
            found: dict[int, tuple[int, int]] = {}
            for start in range(0, 20, size):
                for part in made.embedding_slices(start, min(20, start + size)):
                    for row in range(part.length):
                        place = start + part.offset + row
                        assert place not in found
                        found[place] = (part.embeddings.slot, part.start + row)
            assert found == dict(zip(places, expected, strict=True)), (lengths, size)


def test_between_two_runs_prefill_goes_on_to_what_is_missing() -> None:
    made = request(20, (two_runs(4, 6),))
    made.chunks[0].embeddings = handle(4)
    assert made.num_ready_tokens() == 9
    made.num_computed_tokens = 12
    assert made.num_ready_tokens() == 9, "what the prefix cache covers of a run does not make the rest ready"
    made.num_computed_tokens = 15
    assert made.num_ready_tokens() == 20
    assert made.take_read_leases(8) == []
    assert made.chunks[0].is_read
    assert not made.chunks[1].is_read


def test_the_place_in_an_item_of_two_runs_is_in_the_hash() -> None:
    """The same tokens in the same place, filled by other rows of the item."""

    def last(*spans: Span) -> bytes:
        length = sum(span.length for span in spans)
        made = request(16, (MmItem(spans, b"h", b"h", (MmChunk(b"h", length, 0, 1),)),))
        made.prompt_token_ids = [7] * 16
        return made.block_hashes(4, 4)[3]

    one = MmItem((Span(0, 2), Span(12, 2)), b"h", b"h", ())
    assert one.stop == 14
    assert last(Span(0, 2), Span(12, 2)) != last(Span(0, 3), Span(12, 2))
    assert last(Span(12, 2)) != last(Span(0, 2), Span(12, 2))


def test_each_lease_is_handed_out_once_and_only_when_read() -> None:
    made = request(30, (item(3, 4), item(10, 8)))
    for number, chunk in enumerate(made.chunks):
        chunk.embeddings, chunk.lease = handle(chunk.wire.num_tokens), Lease(0, 1, number + 1)
    assert made.take_read_leases(6) == []
    assert made.take_read_leases(7) == [Lease(0, 1, 1)]
    assert made.take_read_leases(7) == []
    made.num_computed_tokens = 7
    assert made.num_ready_tokens() == 30
    assert made.take_all_leases() == [Lease(0, 1, 2)]


def test_max_tokens_is_cut_to_the_context() -> None:
    assert request(10, max_tokens=None, max_model_len=100).max_tokens == 90
    assert request(10, max_tokens=500, max_model_len=100).max_tokens == 90
    assert request(10, max_tokens=5, max_model_len=100).max_tokens == 5


def test_block_hashes_name_the_text_the_picture_and_the_place_in_it() -> None:
    def hashes(*, tokens: int = 7, kv_hash: bytes = b"h", offset: int = 3, salt: bytes = b"") -> list[bytes]:
        made = request(16, (item(offset, 4),))
        made.items = tuple(msgspec.structs.replace(one, kv_hash=kv_hash) for one in made.items)
        made.prompt_token_ids, made.cache_salt = [tokens] * 16, salt
        return made.block_hashes(4, 4)

    plain = hashes()
    assert plain == hashes()
    assert len(set(plain)) == 4
    for other in (hashes(tokens=8), hashes(kv_hash=b"i"), hashes(offset=2), hashes(salt=b"s")):
        assert not set(plain) & set(other)
    later = hashes(offset=5)
    assert later[0] == hashes(offset=6)[0], "before the picture nothing tells them apart"
    assert later[1] != hashes(offset=6)[1]
