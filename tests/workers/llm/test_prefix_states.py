"""Prefixes of a model whose layers keep a state: what is found in the cache, and that nothing else is.

The tokens without any prefix cache are transformers' (`test_families.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from pipeline.wire.clients import AbortRequest, RequestOutput
from pipeline.wire.generation import EmbeddingReady, GenerateRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns
from tests.checkpoints import make_checkpoint
from tests.engine_rig import CLIENT, Rig
from tests.pictures import noise
from workers.llm.request import Request
from workers.llm.scheduler import Admitted

BLOCK, WINDOW = 16, 64
SYSTEM = "You answer in few words, and never guess. " * 14
ANSWER = "It shows a shape of some colour, as far as one can see it here. " * 3
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5")


def make_rig(folder: Path, num_snapshots: int = 40, budget: int = 4096, **options: int) -> Rig:
    rig = Rig(folder, budget, BLOCK, num_snapshots=num_snapshots, **options)
    rig.open_pool()
    return rig


@pytest.fixture(scope="module")
def plain(folder: Path) -> Rig:
    """Without prefixes."""
    return make_rig(folder, num_snapshots=0)


def turns_of_a_chat(number: int) -> Iterator[ChatTurns]:
    """A chat of six turns with three pictures, as it is sent turn by turn."""
    chat: list[tuple[str, list[object]]] = [("system", [SYSTEM])]
    for turn in range(6):
        picture = [noise(10 * number + turn, (224, 168))] if turn % 2 == 0 else []
        chat.append(("user", [*picture, f"Question {turn} of chat {number}: what do you see now?"]))
        yield list(chat)
        chat.append(("assistant", [ANSWER]))


def answer(
    rig: Rig, request: GenerateRequest, ready: Sequence[EmbeddingReady]
) -> tuple[list[int], RequestOutput]:
    """The tokens, and the first output."""
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        rig.engine.handle(embedding, rig.now)
    rig.run()
    outputs = [one for one in rig.outputs() if one.request_id == request.request_id]
    return [token for one in outputs for token in unpack_int32(one.new_token_ids).tolist()], outputs[0]


def ask(rig: Rig, chat: ChatTurns, name: str, **fields: object) -> tuple[list[int], int, list[int]]:
    """The tokens, how many of the prompt were cached, and the prompt."""
    request, ready = rig.request(chat, name, sampling=GREEDY, **fields)
    tokens, first = answer(rig, request, ready)
    return tokens, first.num_cached_tokens, unpack_int32(request.prompt_token_ids).tolist()


def common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


@pytest.mark.parametrize(("num_snapshots", "budget"), [(40, 4096), (40, 64), (8, 4096)])
def test_each_turn_computes_what_is_new(folder: Path, plain: Rig, num_snapshots: int, budget: int) -> None:
    rig = make_rig(folder, num_snapshots, budget)
    before: list[int] = []
    for number, chat in enumerate(turns_of_a_chat(1)):
        tokens, num_cached, prompt = ask(rig, chat, f"turn {number}")
        assert tokens == ask(plain, chat, f"plain {num_snapshots} {budget} {number}")[0]
        num_new = len(prompt) - common(before, prompt)
        assert len(prompt) - num_cached <= num_new + 2 * WINDOW
        assert num_cached % WINDOW == 0
        before = prompt
    rig.engine.check_integrity()


def test_a_chat_goes_on_from_the_snapshot_before_an_evicted_one(folder: Path, plain: Rig) -> None:
    rig = make_rig(folder)
    *_, before, last = turns_of_a_chat(2)
    _, _, first = ask(rig, before, "first")
    snapshots = rig.scheduler.cache.snapshots
    assert snapshots is not None
    request, _ = rig.request(last, "second", sampling=GREEDY)
    prompt = unpack_int32(request.prompt_token_ids).tolist()
    *_, second_to_last = [
        digest for digest in _hashes(rig, request)[: common(first, prompt) // BLOCK] if digest in snapshots
    ]
    snapshots.forget(second_to_last)
    tokens, num_cached, _ = ask(rig, last, "third")
    assert tokens == ask(plain, last, "plain evicted")[0]
    assert 0 < num_cached <= common(first, prompt) - WINDOW // 2


def _hashes(rig: Rig, request: GenerateRequest) -> list[bytes]:
    made = Request.from_wire(request, 1000)
    return made.block_hashes(len(made.prompt_token_ids) // BLOCK, BLOCK)


def test_an_answer_is_a_prefix(folder: Path, plain: Rig) -> None:
    """Up to the last window, as a chat has it whose template repeats the answer as it came."""
    rig = make_rig(folder)
    chat = next(turns_of_a_chat(3))
    request, ready = rig.request(chat, "a", sampling=msgspec.structs.replace(GREEDY, max_tokens=200))
    tokens, _ = answer(rig, request, ready)
    prompt = unpack_int32(request.prompt_token_ids).tolist()
    longer = pack_int32([*prompt, *tokens, 5, 6, 7])
    positions = unpack_int32(request.positions).reshape(3, -1)
    rows = [
        [*row, *range(len(prompt) + request.position_delta, len(prompt) + request.position_delta + 203)]
        for row in positions.tolist()
    ]
    again = msgspec.structs.replace(
        request, request_id="b", prompt_token_ids=longer, sampling=GREEDY,
        positions=pack_int32([number for row in rows for number in row]),
    )  # fmt: skip
    found, first = answer(rig, again, ())
    assert first.num_cached_tokens >= (len(prompt) + 200 - 1) // WINDOW * WINDOW
    _, embeddings = plain.request(chat, "b")
    assert found == answer(plain, again, embeddings)[0]


def test_what_differs_before_a_boundary_shares_no_state(folder: Path) -> None:
    rig = make_rig(folder)
    chat = next(turns_of_a_chat(4))
    _, _, prompt = ask(rig, chat, "a")
    _, same, _ = ask(rig, chat, "same")
    assert same == (len(prompt) - 1) // WINDOW * WINDOW
    _, salted, _ = ask(rig, chat, "salted", cache_salt=b"other")
    assert salted == 0
    (system, (user, (picture, text))) = chat
    pixel = picture.copy()
    red, green, blue = pixel.getpixel((100, 100))
    pixel.putpixel((100, 100), (255 - red, green, blue))
    _, other_pixel, _ = ask(rig, [system, (user, [pixel, text])], "pixel")
    start = next(item.spans[0].offset for item in rig.request(chat, "x")[0].items)
    assert 0 < other_pixel <= start
    _, other_system, _ = ask(rig, [("system", ["X" + SYSTEM]), (user, [picture, text])], "system")
    assert other_system == 0


def test_choices_go_on_from_the_prompt_that_one_has_computed(
    folder: Path, plain: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(folder)
    chat = list(turns_of_a_chat(5))[1]
    sampling = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=3, n=3)
    texts: list[dict[int, list[int]]] = []
    seen: list[Admitted] = []
    admit = rig.scheduler._admit
    monkeypatch.setattr(rig.scheduler, "_admit", lambda barred: _noted(admit(barred), seen))
    for one, name in ((rig, "r"), (plain, "choices")):
        request, ready = one.request(chat, name, sampling=sampling)
        one.engine.handle(request, one.now)
        for embedding in ready:
            one.engine.handle(embedding, one.now)
        one.run()
        found: dict[int, list[int]] = {}
        for output in one.outputs():
            found.setdefault(output.index, []).extend(unpack_int32(output.new_token_ids).tolist())
        texts.append(found)
    boundary = (len(unpack_int32(request.prompt_token_ids)) - 1) // WINDOW * WINDOW
    assert [admitted.num_cached_tokens for admitted in seen] == [0, boundary, boundary]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def _noted(admitted: list[Admitted], seen: list[Admitted]) -> list[Admitted]:
    seen += admitted
    return admitted


def test_a_preempted_request_goes_on_from_a_snapshot(
    folder: Path, plain: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats: list[ChatTurns] = [[("system", [SYSTEM]), ("user", [f"{ANSWER} {number}?"])] for number in "ab"]
    sampling = msgspec.structs.replace(GREEDY, max_tokens=120)
    (first, _), (second, _) = (plain.request(chat, f"length {at}") for at, chat in enumerate(chats))
    prompts = [unpack_int32(one.prompt_token_ids).tolist() for one in (first, second)]
    num_shared = common(*prompts) // WINDOW * WINDOW // BLOCK
    # Room for both prompts, and for half of their answers.
    rig = make_rig(folder, num_blocks=2 * (len(prompts[0]) + 60) // BLOCK - num_shared)
    made = [rig.request(chat, f"r{number}", sampling=sampling) for number, chat in enumerate(chats)]
    for request, ready in made:
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            rig.engine.handle(embedding, rig.now)
    seen: list[Admitted] = []
    admit = rig.scheduler._admit
    monkeypatch.setattr(rig.scheduler, "_admit", lambda barred: _noted(admit(barred), seen))
    rig.run()
    assert rig.scheduler.num_preemptions > 0
    outputs = rig.outputs()
    assert all(admitted.num_cached_tokens >= num_shared * BLOCK for admitted in seen[2:])
    for number, chat in enumerate(chats):
        mine = [one for one in outputs if one.request_id == f"r{number}"]
        tokens = [token for one in mine for token in unpack_int32(one.new_token_ids).tolist()]
        request, ready = plain.request(chat, f"preempted {number}", sampling=sampling)
        assert tokens == answer(plain, request, ready)[0]


def test_followers_wait_for_a_boundary(folder: Path, plain: Rig) -> None:
    """Eight with one prompt: the first computes it, the others go on from its last window."""
    rig = make_rig(folder, budget=WINDOW)
    chat = list(turns_of_a_chat(8))[1]
    request, ready = rig.request(chat, "0", sampling=GREEDY)
    for number in range(8):
        rig.engine.handle(msgspec.structs.replace(request, request_id=str(number)), rig.now)
    for embedding, number in itertools.product(ready, range(8)):
        key = embedding.key._replace(request_id=str(number))
        rig.engine.handle(msgspec.structs.replace(embedding, key=key), rig.now)
    rig.run()
    outputs = rig.outputs()
    firsts = {number: next(o for o in outputs if o.request_id == str(number)) for number in range(8)}
    boundary = (len(unpack_int32(request.prompt_token_ids)) - 1) // WINDOW * WINDOW
    assert [one.num_cached_tokens for one in firsts.values()] == [0] + [boundary] * 7
    expected = ask(plain, chat, "followers")[0]
    for number in range(8):
        mine = [one for one in outputs if one.request_id == str(number)]
        assert [token for one in mine for token in unpack_int32(one.new_token_ids).tolist()] == expected


def test_who_is_aborted_while_a_step_saves_a_state_leaves_no_place_behind(folder: Path) -> None:
    """The worker checks the cache each second, also while that step is in flight."""
    rig = Rig(folder, 4096, BLOCK, has_overlap=True, num_snapshots=4)
    request, _ = rig.request([("user", ["word " * 200])], "r")
    rig.engine.handle(request, 0.0)
    rig.engine.step(0.0)
    snapshots = rig.scheduler.cache.snapshots
    assert snapshots is not None
    assert snapshots.num_free < 4
    assert rig.engine.stepper.num_in_flight == 1
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), 0.0)
    rig.engine.check_integrity()
    rig.run()
    rig.engine.check_integrity()
    assert snapshots.num_free == 4
