"""Messages from rank 0 to the other ranks of its group: the edge steps."""

from __future__ import annotations

import msgspec

from pipeline.wire.base import PoolClosed, PoolOpened, WorkerMessage
from pipeline.wire.handles import TensorHandle
from pipeline.wire.sampling import SamplingParams


class EmbeddingSlice(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows [start, start + length) of an embedding go to rows [offset, …) of this sequence's part of the
    step."""

    embeddings: TensorHandle
    start: int
    offset: int
    length: int


class SequenceStart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sequence takes a slot of the runner's tables: all that later steps do not repeat.

    Whoever was there is forgotten.
    """

    slot: int
    num_prompt_tokens: int
    sampling: SamplingParams
    token_ids: bytes  # int32: prompt, and output so far
    # int32 [3, num_prompt_tokens]: rows time, height, width; empty: each token's index
    positions: bytes = b""
    position_delta: int = 0  # added to the index of a token behind the prompt
    num_computed_tokens: int = 0  # already in the KV cache
    block_table: bytes = b""  # int32, so far
    is_masked: bool = False  # its tokens are chosen when `TokenMasks` has arrived
    # Of the snapshots of layers' states: what it goes on from, before the plan saves any; -1: no state.
    snapshot: int = -1
    adapter: int = -1  # its number among the options `--lora`; -1: none


class StateSave(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A copy of a sequence's state inside its part of the step, or behind it, is kept."""

    num_tokens: int  # of this part before the state; drafts count, be they right or wrong
    snapshot: int  # of the snapshots: where the copy is kept


class SequenceStep(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sequence's share of a step: only what is new. With nothing but its slot it decodes one token."""

    slot: int
    num_tokens: int = 1
    is_sampled: bool = True  # the step yields the token behind its last one
    new_blocks: bytes = b""  # int32: appended to its block table
    embeddings: tuple[EmbeddingSlice, ...] = ()  # of this part
    # int32: its last tokens are guesses. The step yields tokens up to the first that differs from its guess.
    drafts: bytes = b""
    saves: tuple[StateSave, ...] = ()  # ascending
    num_guesses: int = 0  # of the tokens behind the step: to be made at its end, by a head of the model


class StepPlan(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → ranks: compute exactly this next. Numbered without gaps."""

    step: int
    started: tuple[SequenceStart, ...]
    sequences: tuple[SequenceStep, ...]
    is_wide: bool = False  # on all cores: no other worker computes


class TokenMasks(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → ranks: choose the tokens that this step left open. Only the plan of such a step has it
    behind it."""

    step: int
    # For each masked and sampled sequence, in the plan's order, and behind it for each of its drafts: a bit
    # for each token of the vocabulary, the lowest bit of a byte first; empty: all tokens are allowed.
    masks: tuple[bytes, ...]


# steps: llm rank 0 → the other ranks of its group
StepsMessage = PoolOpened | PoolClosed | StepPlan | TokenMasks
