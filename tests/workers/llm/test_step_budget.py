from __future__ import annotations

from tests.workers.llm.test_scheduler import make
from workers.llm.request import Request
from workers.llm.step_budget import StepBudget
from workers.llm.step_times import Measured, StepTimes


def decoding(name: str) -> Request:
    request = make(name, 4, max_tokens=9)
    request.output_token_ids.append(1)
    request.num_computed_tokens = 4
    return request


def test_decodes_come_first_and_prefills_get_what_is_left() -> None:
    budget = StepBudget(8, None)
    first, second = make("first", 20), make("second", 20)
    streams = [decoding(f"stream {number}") for number in range(3)]
    ready = [(first, 20), *((stream, 1) for stream in streams), (second, 20)]
    parts, num_decodes = budget.divide(ready)
    assert num_decodes == 3
    assert parts[:3] == [(stream, 1) for stream in streams]
    assert sum(num_tokens for _, num_tokens in parts) == 8
    assert budget.divide([(stream, 1) for stream in streams] * 4)[1] == 8, "decodes are cut, too"


def test_beside_a_stream_prefill_gets_what_is_nearly_free() -> None:
    times = StepTimes([Measured(1, 1.0), Measured(4, 1.1), Measured(64, 60.0)], 0.0, 1.5)
    budget, long = StepBudget(64, times), make("long", 60)
    assert budget.divide([(long, 60)]) == ([(long, 60)], 0)
    parts, num_decodes = budget.divide([(decoding("stream"), 1), (make("other", 60), 60)])
    assert num_decodes == 1
    assert 0 < parts[1][1] < 10


def test_prefills_are_cut_at_multiples_where_there_is_room() -> None:
    budget, long = StepBudget(100, None, 64), make("long", 300)
    taken = []
    while (left := 300 - long.num_computed_tokens) > 0:
        parts, _ = budget.divide([(long, left)])
        taken.append(parts[0][1])
        long.num_computed_tokens += taken[-1]
    assert taken == [64, 64, 64, 64, 44], "and the rest at once"
    short, stream = make("short", 30), decoding("stream")
    parts, _ = budget.divide([(stream, 1), (short, 30), (make("other", 300), 300)])
    assert [num_tokens for _, num_tokens in parts] == [1, 30, 64]


def test_a_step_without_room_for_a_multiple_is_filled() -> None:
    budget, long = StepBudget(30, None, 64), make("long", 300)
    taken = []
    for _ in range(5):
        parts, _ = budget.divide([(long, 300 - long.num_computed_tokens)])
        taken.append(parts[0][1])
        long.num_computed_tokens += taken[-1]
    assert taken == [30, 30, 4, 30, 30]


def test_a_step_may_be_kept_for_decodes_but_prefill_alone_is_never_deferred() -> None:
    times = StepTimes([Measured(1, 1.0), Measured(64, 60.0)], 0.0, 1.5)
    budget, long = StepBudget(64, times), make("long", 60)
    budget.is_prefill_deferred = True
    stream = decoding("stream")
    assert budget.divide([(stream, 1), (long, 60)]) == ([(stream, 1)], 1)
    assert budget.divide([(long, 60)]) == ([(long, 60)], 0)
    budget.is_prefill_deferred = False
    assert len(budget.divide([(stream, 1), (long, 60)])[0]) == 2


def test_a_step_may_be_stretched_further() -> None:
    times = StepTimes([Measured(1, 1.0), Measured(64, 64.0)], 0.0, 2.0)
    budget, ready = StepBudget(64, times), [(decoding("stream"), 1), (make("long", 60), 60)]
    ((_, usual),) = budget.divide(ready)[0][1:]
    budget.stretch = 9.0
    ((_, more),) = budget.divide(ready)[0][1:]
    assert (usual, more) == (1, 8)
