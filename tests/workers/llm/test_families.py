"""Every family through every cut of a prompt: chunks of any size, embeddings in any order, prefixes of any
length. Greedy tokens are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from pipeline.wire.clients import AbortRequest
from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns, FrameList
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine_rig import CLIENT, NUM_TOKENS, Rig
from tests.pictures import noise, scene
from tests.reference import Answer, Reference, assert_same_tokens
from tests.videos import CLIP

BLOCK = 4
FILM = tuple(scene(number, (128, 96)) for number in range(12, 17))
MIXED: ChatTurns = [
    ("system", ["Be brief."]),
    ("user", [scene(1, (140, 112)), "then", CLIP, "and", noise(2, (90, 200))]),
    ("assistant", ["I see."]),
    ("user", [FrameList(FILM, fps=2.0), "What changed?"]),
]
TIMED = {fps: [("user", ["Look:", FrameList(FILM, fps=fps), "Which was first?"])] for fps in (1.0, 4.0)}


class Family(NamedTuple):
    folder: Path
    mixed: Answer
    timed: dict[float, Answer]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    reference = Reference(folder)
    sees_time = reference.has_frame_times
    timed = {fps: reference.answer(chat, NUM_TOKENS) for fps, chat in TIMED.items()} if sees_time else {}
    chat = MIXED if sees_time else without_times(MIXED)
    return Family(folder, reference.answer(chat, NUM_TOKENS), timed)


def without_times(chat: ChatTurns) -> ChatTurns:
    return [
        (role, [piece.frames if isinstance(piece, FrameList) else piece for piece in pieces])
        for role, pieces in chat
    ]


def mixed_of(rig: Rig) -> ChatTurns:
    return MIXED if rig.info.family.has_frame_times else without_times(MIXED)


def test_the_reference_text_is_lively(family: Family) -> None:
    assert len(set(family.mixed.token_ids)) >= NUM_TOKENS // 3
    if family.timed:
        first, second = family.timed.values()
        assert first.token_ids != second.token_ids, "the time between frames changes the answer"


@pytest.mark.parametrize("budget", [1, 7, 64, 4096])
@pytest.mark.parametrize("order", ["in order", "reversed"])
def test_any_chunks_and_any_order_give_the_same_tokens(family: Family, budget: int, order: str) -> None:
    rig = Rig(family.folder, budget, BLOCK, num_vits=3)
    rig.open_pool()
    rig.scheduler.has_prefix_cache = False
    request, ready = rig.request(mixed_of(rig), "r")
    assert unpack_int32(request.prompt_token_ids).tolist() == family.mixed.prompt_token_ids
    assert len(ready) > len(request.items), "a video comes in several chunks"
    rig.engine.handle(request, rig.now)
    for embedding in ready if order == "in order" else reversed(ready):
        rig.run()  # prefills as far as it can before each arrival
        rig.engine.handle(embedding, rig.now)
    rig.run()
    assert_same_tokens(rig.tokens("r"), family.mixed)


def test_a_prefix_of_any_number_of_blocks_is_hit(family: Family) -> None:
    """Also one that ends inside a picture or a frame."""
    rig = Rig(family.folder, BLOCK, BLOCK, num_vits=3)
    rig.open_pool()
    few = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, seed=1)
    request, ready = rig.request(mixed_of(rig), "r", sampling=few)
    num_tokens = len(family.mixed.prompt_token_ids)
    expected = family.mixed._replace(token_ids=family.mixed.token_ids[:6])
    inside = 0
    for count in range(1, (num_tokens - 1) // BLOCK + 1):
        salt = b"%d" % count
        for name in ("first", "second"):
            mine = msgspec.structs.replace(request, request_id=f"{name} {count}", cache_salt=salt)
            rig.engine.handle(mine, rig.now)
            for embedding in ready:
                key = embedding.key._replace(request_id=mine.request_id)
                rig.engine.handle(msgspec.structs.replace(embedding, key=key), rig.now)
            if name == "first":
                for _ in range(count):
                    rig.engine.step(rig.now)
                rig.engine.handle(
                    AbortRequest(client_id=CLIENT, request_id=mine.request_id, attempt=1), rig.now
                )
            rig.run()
        outputs = [output for output in rig.outputs() if output.request_id == f"second {count}"]
        tokens = [token for output in outputs for token in unpack_int32(output.new_token_ids).tolist()]
        assert outputs[0].num_cached_tokens == count * BLOCK
        assert_same_tokens(tokens, expected, f"a prefix of {count} blocks")
        stop = count * BLOCK
        inside += any(span.offset < stop < span.stop for item in request.items for span in item.spans)
    assert inside > 4


def test_only_the_time_between_frames_differs(family: Family) -> None:
    """The same pixels: one key for the ViT, and none in the prefix cache behind the text before them."""
    if not family.timed:
        pytest.skip("this family sees no time")
    rig = Rig(family.folder, 64, BLOCK)
    rig.open_pool()
    hashes: list[list[bytes]] = []
    for fps, answer in family.timed.items():
        request, ready = rig.request(TIMED[fps], f"r{fps}")
        hashes.append([chunk.mm_hash for item in request.items for chunk in item.chunks])
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            rig.engine.handle(embedding, rig.now)
        rig.run()
        outputs = rig.outputs()
        tokens = [token for output in outputs for token in unpack_int32(output.new_token_ids).tolist()]
        assert_same_tokens(tokens, answer, f"{fps} frames a second")
        assert outputs[0].num_cached_tokens < request.items[0].spans[0].stop
    assert hashes[0] == hashes[1]
