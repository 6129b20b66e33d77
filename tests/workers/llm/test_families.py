"""Every family through every cut of a prompt: chunks of any size, embeddings in any order, prefixes of any
length. Greedy tokens are Hugging Face's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from pipeline.families import read_model_info
from pipeline.wire.clients import AbortRequest
from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns, Clip, FrameList
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine_rig import CLIENT, Rig
from tests.pictures import noise, scene
from tests.reference import Answer, Reference, assert_same_tokens
from tests.videos import counting_frames, encode_video

BLOCK = 4
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)


class Chats(NamedTuple):
    """Of a model that takes sides of multiples of `factor`: frames keep their size, since resizing of videos
    is Pillow's here and torch's there, which differ by one step of grey in places."""

    mixed: ChatTurns
    short: ChatTurns
    timed: dict[float, ChatTurns]


def chats_of(factor: int, sees_time: bool) -> Chats:
    size = width, height = 4 * factor, 3 * factor
    film = tuple(scene(number, size) for number in range(12, 17))
    clip = Clip(encode_video(counting_frames(30, size), 10.0), fps=2.0)
    mixed: ChatTurns = [
        ("system", ["Be brief."]),
        ("user", [scene(1, (140, 112)), "then", clip, "and", noise(2, (90, 200))]),
        ("assistant", ["I see."]),
        ("user", [FrameList(film, fps=2.0) if sees_time else film, "What changed?"]),
    ]
    short: ChatTurns = [("user", [noise(3, (width, height)), film[:3], "And?"])]
    rates = (1.0, 4.0) if sees_time else ()
    timed = {fps: [("user", ["Look:", FrameList(film, fps=fps), "Which was first?"])] for fps in rates}
    return Chats(mixed, short, timed)


class Family(NamedTuple):
    folder: Path
    chats: Chats
    mixed: Answer
    short: Answer
    timed: dict[float, Answer]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    info = read_model_info(folder)
    chats = chats_of(info.vision.factor, info.family.has_frame_times)
    answer = partial(Reference(folder).answer, num_tokens=NUM_TOKENS)
    timed = {fps: answer(chat) for fps, chat in chats.timed.items()}
    return Family(folder, chats, answer(chats.mixed), answer(chats.short), timed)


def test_the_reference_text_is_lively(family: Family) -> None:
    assert len(set(family.mixed.token_ids)) >= NUM_TOKENS // 4
    if family.timed:
        first, second = family.timed.values()
        assert first.token_ids != second.token_ids, "the time between frames changes the answer"


@pytest.mark.parametrize(
    ("budget", "order"),
    [
        (1, "reversed"), (7, "in order"), (63, "reversed"), (64, "in order"), (65, "reversed"),
        (4096, "in order"),
    ],
)  # fmt: skip
def test_any_chunks_and_any_order_give_the_same_tokens(family: Family, budget: int, order: str) -> None:
    rig = Rig(family.folder, budget, BLOCK, num_vits=3)
    rig.open_pool()
    rig.scheduler.prefixes.has_cache = False
    request, ready = rig.request(family.chats.mixed, "r", sampling=GREEDY)
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
    if not rig.scheduler.cache.has_prefixes:
        pytest.skip("no states of prefixes are kept")
    few = msgspec.structs.replace(GREEDY, max_tokens=6)
    request, ready = rig.request(family.chats.short, "r", sampling=few)
    num_tokens = len(family.short.prompt_token_ids)
    expected = family.short._replace(token_ids=family.short.token_ids[:6])
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
        request, ready = rig.request(family.chats.timed[fps], f"r{fps}", sampling=GREEDY)
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
