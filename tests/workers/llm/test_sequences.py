"""What a rank keeps by slot: a step says only what is new, and nobody finds what another left in a slot."""

from __future__ import annotations

import numpy as np

from pipeline.wire.handles import TensorHandle
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import EmbeddingSlice, SequenceStart, SequenceStep
from workers.llm.sequences import SequenceTable

GREEDY = SamplingParams(temperature=0, seed=1)
# Two tokens of text, a picture of 2 x 3 tokens, three tokens of text.
PICTURE = np.array(
    [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7]],
)
DELTA = 8 - 11


def start(
    slot: int,
    num_tokens: int,
    *,
    num_computed: int = 0,
    blocks: tuple[int, ...] = (),
) -> SequenceStart:
    token_ids, table = pack_int32(range(100, 100 + num_tokens)), pack_int32(blocks)
    return SequenceStart(
        slot,
        num_tokens,
        GREEDY,
        token_ids,
        num_computed_tokens=num_computed,
        block_table=table,
    )


def with_picture(slot: int, num_tokens: int, num_output: int = 0) -> SequenceStart:
    token_ids = pack_int32(range(num_tokens + num_output))
    return SequenceStart(
        slot,
        num_tokens,
        GREEDY,
        token_ids,
        positions=pack_int32(PICTURE[:, :num_tokens]),
        position_delta=DELTA,
    )


def test_steps_add_up() -> None:
    made = SequenceTable(3, 8)
    made.start(start(2, 9, num_computed=4, blocks=(5, 3)))
    rows = made.rows([SequenceStep(2, 5, new_blocks=pack_int32([7]))])
    assert (rows.slots.tolist(), rows.starts.tolist(), rows.stops.tolist()) == ([2], [4], [9])
    assert made.block_table(2).tolist() == [5, 3, 7]
    assert made.token_ids(2, 4, 9).tolist() == [104, 105, 106, 107, 108]
    made.advance(rows)
    rows = made.rows([SequenceStep(2)])
    assert (rows.starts.tolist(), rows.counts.tolist(), rows.are_decodes.tolist()) == ([9], [1], [True])
    made.start(start(2, 3, blocks=(1,)))
    assert made.block_table(2).tolist() == [1], "another sequence has the slot"
    assert made.rows([SequenceStep(2, 3)]).starts.tolist() == [0]


def test_a_draft_counts_once_it_is_accepted() -> None:
    made = SequenceTable(3, 8)
    for slot in range(3):
        made.start(start(slot, 4, blocks=(1,)))
        made.lengths[slot] = 5
    rows = made.rows([SequenceStep(1), SequenceStep(2, 3, drafts=pack_int32([8, 9])), SequenceStep(0, 3)])
    assert rows.counts.tolist() == [1, 3, 3]
    assert rows.stops.tolist() == [6, 6, 8], "without drafts"
    assert rows.are_decodes.tolist() == [True, False, False]
    assert {row: drafts.tolist() for row, drafts in rows.drafts.items()} == {1: [8, 9]}
    made.advance(rows)
    made.accept(np.array([2]))
    assert made.lengths[:3].tolist() == [8, 6, 7]
    assert made.rows([SequenceStep(2)]).starts.tolist() == [7], "the other draft is forgotten"


def test_positions_behind_the_prompt_go_on_with_the_delta() -> None:
    made = SequenceTable(1, 8)
    made.start(with_picture(0, 11, num_output=2))
    assert np.array_equal(made.positions(0, 0, 11), PICTURE)
    parts = [made.positions(0, 0, 5), made.positions(0, 5, 11)]
    assert np.array_equal(np.concatenate(parts, axis=1), PICTURE)
    assert made.positions(0, 10, 13).tolist() == [[7, 8, 9]] * 3


def test_positions_of_text_are_its_indices() -> None:
    made = SequenceTable(1, 8)
    made.start(start(0, 5))
    assert made.positions(0, 2, 7).tolist() == [[2, 3, 4, 5, 6]] * 3


def test_what_is_a_decode() -> None:
    """The device has the last token that was known at the start, and all that it has sampled since."""
    made = SequenceTable(8, 8)
    for slot, num_computed in enumerate((3, 4, 5)):
        made.start(start(slot, 5, num_computed=num_computed))
    made.start(with_picture(3, 8))
    made.start(with_picture(4, 11, num_output=1))
    made.lengths[3], made.lengths[4] = 7, 11
    embedding = EmbeddingSlice(TensorHandle("vit.0", 1, 0, 1, 0, (1, 8), "float32"), 0, 0, 1)
    steps = {
        "not the last token": (SequenceStep(0), False),
        "the last token": (SequenceStep(1), True),
        "behind the prompt": (SequenceStep(2), True),
        "two tokens": (SequenceStep(2, 2), False),
        "not sampled": (SequenceStep(1, is_sampled=False), False),
        "reads an embedding": (SequenceStep(1, embeddings=(embedding,)), False),
        "a picture's positions differ": (SequenceStep(3), False),
        "an earlier attempt's last token": (SequenceStep(4), True),
    }
    rows = made.rows([step for step, _ in steps.values()])
    found = dict(zip(steps, rows.are_decodes.tolist(), strict=True))
    assert found == {name: is_decode for name, (_, is_decode) in steps.items()}
