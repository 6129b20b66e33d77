"""Which states the scheduler keeps, for whom, and which make room. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.wire.generation import MmChunk, MmItem, Span
from pipeline.wire.handles import TensorHandle
from pipeline.wire.sampling import SamplingParams
from workers.llm.cache.manager import CacheManager
from workers.llm.chunk import chunks_of
from workers.llm.request import Request
from workers.llm.scheduler import Scheduler
from workers.llm.speculation.drafter import Drafter

TURN, WORD = 3, 5
ARRIVALS = itertools.count(1)


class Eights:
    def extend(self, token_ids: Sequence[int]) -> None:
        """Whatever the text is."""

    def propose(self, num_tokens: int) -> list[int]:
        return [8] * num_tokens


def make(
    name: str, prompt: list[int], max_tokens: int = 4, item: MmItem | None = None, **sampling: int
) -> Request:
    """Its embeddings are here."""
    positions = np.tile(np.arange(len(prompt), dtype=np.int32), (3, 1))
    items = () if item is None else (item,)
    chunks = [chunk for number, one in enumerate(items) for chunk in chunks_of(number, one)]
    for chunk in chunks:
        chunk.embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (chunk.wire.num_tokens, 8), "float32")
    params = SamplingParams(ignore_eos=True, **sampling)
    return Request(
        b"c", name, 1, next(ARRIVALS), prompt, positions, 0, chunks, items, params, max_tokens
    )  # fmt: skip


def scheduler(num_snapshots: int, budget: int = 4096) -> Scheduler:
    cache = CacheManager.of_size(400, 16, 8, True, num_snapshots)
    return Scheduler(cache, budget, (7,), prefill_multiple=64, turn_start_id=TURN)


def run(made: Scheduler, *requests: Request) -> dict[str, int]:
    """Until all have ended. How many of each one's tokens were cached when it was first admitted."""
    for request in requests:
        made.add(request)
    cached: dict[str, int] = {}
    while made.running or made.waiting:
        schedule = made.schedule()
        for admitted in schedule.admitted:
            cached.setdefault(admitted.request.request_id, admitted.num_cached_tokens)
        made.update(
            schedule.scheduled, {item.request.key: [1] for item in schedule.scheduled if item.is_sampled}
        )
        made.check_integrity()
    made.cache.check_empty()
    return cached


def test_a_prompt_may_end_with_a_picture() -> None:
    item = MmItem((Span(164, 28),), b"h", b"h", (MmChunk(b"a", 28, 0, 1),))
    assert run(scheduler(4), make("a", [WORD] * 192, item=item)) == {"a": 0}


def test_an_answer_makes_room_for_itself() -> None:
    made = scheduler(2)
    run(made, make("a", [WORD] * 150, max_tokens=200))
    assert run(made, make("b", [WORD] * 150)) == {"b": 128}


def test_an_answer_takes_nothing_from_a_prompt_that_is_the_same() -> None:
    """The second one's text, prompt and answer, passes the first one's prompt."""
    made, text = scheduler(4), [WORD] * 130 + [1] * 130
    run(made, make("whole", text))
    run(made, make("begun", text[:140], max_tokens=250))
    assert run(made, make("again", text))["again"] == 256


def test_who_passes_a_boundary_of_another_does_not_end_the_wait_for_it() -> None:
    """The longest has no boundary at 384. Its blocks there are no state for the one that waits."""
    made = scheduler(8, budget=128)
    longest, owner, follower = (
        make(name, [WORD] * count) for name, count in zip("loF", (700, 400, 401), strict=True)
    )
    assert run(made, longest, owner, follower)["F"] == 384


def test_a_request_for_log_probabilities_of_its_prompt_takes_no_place() -> None:
    made = scheduler(2)
    run(made, make("a", [WORD] * 150))
    for number in range(3):
        run(made, make(f"scored {number}", [WORD + 1 + number] * 300, max_tokens=200, prompt_logprobs=1))
    assert run(made, make("b", [WORD] * 150)) == {"b": 128}


def test_the_system_prompt_of_a_chat_that_goes_on_stays() -> None:
    made, system = scheduler(6), [TURN, *[WORD] * 199]
    chat = list(system)
    for turn in range(8):
        chat += [TURN, *[10 + turn] * 149]
        run(made, make(f"turn {turn}", list(chat)))
    assert run(made, make("other", [*system, TURN, *[9] * 300]))["other"] == 192


def test_a_prompt_of_many_pictures_leaves_its_system_prompt() -> None:
    made, system = scheduler(8), [TURN, *[WORD] * 199]
    run(made, make_pictures("pictures", 8))
    assert run(made, make("other", [*system, TURN, *[9] * 300]))["other"] == 192


def make_pictures(name: str, count: int) -> Request:
    """A system prompt, and so many pictures. Boundaries: at 192, behind each picture, and before the end."""
    spans = [Span(210 + 140 * number, 130) for number in range(count)]
    request = make(name, [TURN, *[WORD] * 199, TURN, *[WORD] * (count * 140 + 20)])
    request.items = tuple(MmItem((span,), b"%d" % span.offset, b"h", ()) for span in spans)
    return request


def test_a_prompt_of_many_pictures_is_one_step() -> None:
    made, request = scheduler(16), make_pictures("a", 3)
    made.add(request)
    assert [boundary.position for boundary in request.boundaries] == [192, 320, 448, 576, 640]
    (item,) = made.schedule().scheduled
    assert (item.start, item.stop, item.is_sampled) == (0, len(request.prompt_token_ids), True)
    assert [save.position for save in item.saves] == [192, 320, 448, 576, 640]
    assert made.cache.snapshots is not None
    assert not len(made.cache.snapshots), "the step has not run"
    made.update([item], {request.key: [1]})
    assert len(made.cache.snapshots) == 5
    made.remove(request)
    assert run(made, make_pictures("b", 2)) == {"b": 448}


def test_parts_of_a_prompt_save_at_the_boundaries_within_them() -> None:
    made, request = scheduler(16, budget=256), make_pictures("a", 3)
    made.add(request)
    parts: list[tuple[int, list[int]]] = []
    while not request.output_token_ids:
        (item,) = made.schedule().scheduled
        parts.append((item.stop, [save.position for save in item.saves]))
        made.update([item], {request.key: [1]})
    assert parts == [(256, [192]), (512, [320, 448]), (641, [576, 640])]
    made.remove(request)
    made.cache.check_empty()


def test_states_inside_a_step_are_kept_of_who_is_preempted_and_dropped_of_who_ends() -> None:
    made, request = scheduler(16), make_pictures("a", 3)
    made.add(request)
    schedule = made.schedule()
    made._preempt(request)
    made.update(schedule.scheduled, {request.key: [1]})
    assert made.cache.snapshots is not None
    assert len(made.cache.snapshots) == 5
    made.remove(request)
    ended = make_pictures("b", 3)
    ended.prompt_token_ids[1] = WORD + 1
    made.add(ended)
    (item,) = made.schedule().scheduled
    assert len(item.saves) == 5
    made.remove(ended)
    made.update([item], {ended.key: [1]})
    assert len(made.cache.snapshots) == 5
    made.cache.check_empty()


def decode(made: Scheduler, drafts: list[int], accepted: int, request: Request) -> None:
    """A step of a lone request that decodes, with these drafts."""
    (item,) = made.schedule().scheduled
    assert list(item.drafts) == drafts
    made.update([item], {request.key: [*drafts[:accepted], 1]})
    made.check_integrity()


@pytest.mark.parametrize(("accepted", "is_kept"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_state_behind_a_draft_is_kept_if_the_draft_is_right(accepted: int, is_kept: bool) -> None:
    made, drafts = scheduler(4), [8, 8, 8]
    made.drafter = Drafter(lambda: Eights(), 3)
    request = make("a", [WORD] * 188, max_tokens=50)
    made.add(request)
    made.update(made.schedule().scheduled, {request.key: [1]})
    decode(made, drafts, 0, request)
    (item,) = made.schedule().scheduled
    assert (item.stop, [save.position for save in item.saves]) == (190, [192])
    made.update([item], {request.key: [*drafts[:accepted], 1]})
    assert made.cache.snapshots is not None
    digest = request.block_hashes(12, 16)[-1] if request.num_tokens >= 192 else b""
    assert (digest in made.cache.snapshots) == is_kept
    assert made.cache.snapshots.has_free_place
    made.check_integrity()
    while digest not in made.cache.snapshots:  # a step reaches it
        decode(made, drafts, 0, request)
        digest = request.block_hashes(12, 16)[-1] if request.num_tokens >= 192 else b""
    assert request.num_computed_tokens - 3 <= 192 <= request.num_computed_tokens
    made.remove(request)
    made.cache.check_empty()
    assert run(made, make("b", [WORD] * 188 + request.output_token_ids[:4] + [1] * 9))["b"] == 192
