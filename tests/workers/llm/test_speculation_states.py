"""Drafts for a model whose layers keep a state: no state of a wrong draft survives."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32
from tests.checkpoints import make_checkpoint
from tests.engine_rig import CLIENT, Rig
from tests.fakes import PREPROCESS
from tests.workers.llm.speculation.guesses import drafter_of
from tests.workers.llm.test_speculation import (
    GREEDY,
    WANTED,
    Told,
    assert_go_on,
    assert_same,
    drafted,
    finish,
    submit,
    submit_again,
    with_,
)

Expected = dict[tuple[str, int], Told]


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    rig = Rig(folder, 512, block_size=4)
    for name, params in WANTED.items():
        submit(rig, name, params)
    return finish(rig)


@pytest.mark.parametrize(
    ("budget", "num_blocks", "max_rows", "num_snapshots"),
    [(512, 600, 64, 0), (512, 600, 12, 9), (11, 600, 64, 0), (512, 85, 64, 9), (20, 60, 64, 0)],
    ids=["free", "few rows, prefixes", "chunks", "little memory, prefixes", "chunks in less memory"],
)
def test_every_kind_of_sampling_gives_the_same(
    budget: int, num_blocks: int, max_rows: int, num_snapshots: int, folder: Path, expected: Expected
) -> None:
    rig = Rig(folder, budget, block_size=4, num_blocks=num_blocks, num_snapshots=num_snapshots)
    for name, params in WANTED.items():
        submit(rig, name, params)
    drafter = drafted(rig, expected, max_rows)
    assert_same(finish(rig), expected)
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 40
    assert (
        drafter.counters["spec_decode_num_draft_tokens"] > drafter.counters["spec_decode_num_accepted_tokens"]
    )
    assert bool(rig.scheduler.num_preemptions) == (num_blocks < 100)
    rig.scheduler.cache.check_empty()


def test_the_next_attempt_goes_on_with_guesses(folder: Path, expected: Expected) -> None:
    rig = Rig(folder, 30, block_size=4)
    submit_again(rig, expected)
    drafter = drafted(rig, expected)
    assert_go_on(finish(rig), expected)
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 40


def test_a_prefix_ends_where_guesses_were_right(folder: Path) -> None:
    """The next turn goes on from a state behind the answer, which was saved among guesses."""
    plain, guessing = (Rig(folder, 512, block_size=16, num_snapshots=6) for _ in range(2))
    for rig in (plain, guessing):
        submit(rig, "answer", with_(GREEDY, max_tokens=150))
    (prompt,) = (choices.all[0].prompt_token_ids for choices in plain.engine.requests.values())
    told = finish(plain)
    text = [*prompt, *told["answer", 0].tokens]
    guessing.scheduler.drafter = drafter_of([text])
    assert_same(finish(guessing), told)
    assert guessing.engine.counters["steps"] < 75
    tokens, num_cached = [], []
    for rig in (guessing, Rig(folder, 512, block_size=16)):
        request = GenerateRequest(
            sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id="next", attempt=1, arrival=9,
            prompt_token_ids=pack_int32([*text, 7, 8, 9]),
            positions=pack_int32([*range(len(text) + 3)] * 3), position_delta=0, items=(), sampling=GREEDY,
        )  # fmt: skip
        rig.engine.handle(request, 0.0)
        rig.run()
        outputs = rig.outputs()
        tokens.append(b"".join(output.new_token_ids for output in outputs))
        num_cached.append(outputs[0].num_cached_tokens)
    assert num_cached == [128, 0]
    assert tokens[0] == tokens[1]
