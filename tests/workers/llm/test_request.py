from __future__ import annotations

import msgspec
import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.messages import GenerateRequest, GridTHW, MmChunk, MmItem, pack_int32
from pipeline.sampling import SamplingParams
from pipeline.tensors import TensorHandle
from pipeline.topology import Role, WorkerId
from tests.chats import CHATS
from tests.reference import Reference
from tests.videos import VIDEO_CHATS
from workers.llm.request import Lease, Request, mrope_positions


def item(offset: int, grid: GridTHW) -> MmItem:
    length = grid.num_patches // 4
    return MmItem(offset, length, grid, b"hash", (MmChunk(b"hash", length, 0, 1),))


def request(num_tokens: int, items: tuple[MmItem, ...] = (), max_tokens: int | None = 8, max_model_len: int = 1000) -> Request:
    message = GenerateRequest(
        sender=WorkerId(Role.PREPROCESS),
        epoch=1,
        client_id=b"c" * 16,
        request_id="r",
        attempt=1,
        arrival=1,
        prompt_token_ids=pack_int32(range(num_tokens)),
        items=items,
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    return Request.from_wire(message, 2, max_model_len)


@pytest.mark.parametrize("name", [*CHATS, *VIDEO_CHATS])
def test_positions_are_those_of_hugging_face(name: str) -> None:
    reference = Reference(EMBEDDED / "model")
    inputs = reference.inputs({**CHATS, **VIDEO_CHATS}[name])
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    grids = {name: inputs.get(name, torch.empty(0, 3, dtype=torch.int64)) for name in ("image_grid_thw", "video_grid_thw")}
    positions, deltas = reference.model.model.get_rope_index(ids, mm_token_type_ids=types, **grids)
    items, search = [], 0
    waiting = [iter(of_kind.tolist()) for of_kind in grids.values()]
    for _ in range(sum(map(len, grids.values()))):
        start = next(i for i in range(search, ids.shape[1]) if types[0, i])
        items.append(item(start, GridTHW(*next(waiting[int(types[0, start]) - 1]))))
        search = start + items[-1].length
    ours, delta = mrope_positions(ids.shape[1], items, 2)
    assert ours.tolist() == positions[:, 0].tolist()
    assert delta == int(deltas[0, 0])


def test_a_video_counts_time_in_the_first_row() -> None:
    positions, delta = mrope_positions(2 + 3 * 2 * 2 + 1, [item(2, GridTHW(3, 4, 4))], 2)
    assert positions[0].tolist() == [0, 1] + [2] * 4 + [3] * 4 + [4] * 4 + [5]
    assert positions[2].tolist() == [0, 1] + [2, 3, 2, 3] * 3 + [5]
    assert delta == 6 - 15


def handle(rows: int) -> TensorHandle:
    return TensorHandle("vit.0", 1, 0, 1, 0, (rows, 8), "float32")


def test_prefill_may_go_up_to_the_first_missing_embedding() -> None:
    made = request(30, (item(3, GridTHW(1, 4, 4)), item(10, GridTHW(1, 4, 8))))
    assert made.num_ready_tokens() == 3
    made.chunks[1].embeddings = handle(8)
    assert made.num_ready_tokens() == 3
    made.chunks[0].embeddings = handle(4)
    assert made.num_ready_tokens() == 30


def test_embeddings_are_cut_to_the_chunk_of_the_step() -> None:
    made = request(30, (item(3, GridTHW(1, 4, 4)), item(10, GridTHW(1, 4, 8))))
    for chunk in made.chunks:
        chunk.embeddings = handle(chunk.wire.num_tokens)
    slices = made.embedding_slices(5, 14)
    assert [(part.start, part.offset, part.length) for part in slices] == [(2, 0, 2), (0, 5, 4)]
    assert made.embedding_slices(7, 10) == ()


def test_each_lease_is_handed_out_once_and_only_when_read() -> None:
    made = request(30, (item(3, GridTHW(1, 4, 4)), item(10, GridTHW(1, 4, 8))))
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
    def hashes(*, tokens: int = 7, mm_hash: bytes = b"h", offset: int = 3, salt: bytes = b"") -> list[bytes]:
        made = request(16, (item(offset, GridTHW(1, 4, 4)),))
        made.items = tuple(msgspec.structs.replace(one, mm_hash=mm_hash) for one in made.items)
        made.prompt_token_ids, made.cache_salt = [tokens] * 16, salt
        return made.block_hashes(4, 4)

    plain = hashes()
    assert plain == hashes()
    assert len(set(plain)) == 4
    for other in (hashes(tokens=8), hashes(mm_hash=b"i"), hashes(offset=2), hashes(salt=b"s")):
        assert not set(plain) & set(other)
    later = hashes(offset=5)
    assert later[0] == hashes(offset=6)[0], "before the picture nothing tells them apart"
    assert later[1] != hashes(offset=6)[1]
