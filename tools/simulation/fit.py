"""Stage times out of a server's traces (`--trace-dir`). Pure.

The server must have run without its prefix cache: what a step computes of a prompt is counted from the
prompt's beginning.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.process.trace import TraceSpan
from tools.simulation.stages import EncodeCost, StageTimes, StepCost

LONGEST_BETWEEN_S = 0.02  # between two steps of a request; longer pauses are not the engine's
STEP_NAMES = ("decode", "prefill", "decode and prefill")
Array = np.ndarray[Any, np.dtype[np.float64]]


class Spans(NamedTuple):
    """Of one server; each list by start."""

    prepare: Sequence[TraceSpan]
    tokenise: Sequence[TraceSpan]
    decode_picture: Sequence[TraceSpan]
    encode: Sequence[TraceSpan]
    steps: Sequence[TraceSpan]

    @classmethod
    def of(cls, found: Mapping[str, Sequence[TraceSpan]]) -> Spans:
        """By worker, as `tools.trace.read_spans` gives them."""
        by_name: dict[str, list[TraceSpan]] = defaultdict(list)
        for worker, spans in found.items():
            for span in spans:
                is_step = worker.startswith("llm.") and span.name in STEP_NAMES
                by_name["step" if is_step else span.name].append(span)
        for spans in by_name.values():
            spans.sort(key=lambda span: span.start)
        named = ("prepare", "tokenise", "decode picture", "encode", "step")
        return cls(*(by_name[name] for name in named))


class StepRow(NamedTuple):
    num_decodes: int
    num_context: int
    num_prefill: int
    num_pairs: int
    seconds: float


def fit(spans: Spans, megapixels: Mapping[str, float], takes_turns: bool) -> StageTimes:
    """`megapixels`: of a request's picture as it came, by the request's id; each has one at most. Raises
    ValueError where the traces lack a stage."""
    for name, found in zip(Spans._fields, spans, strict=True):
        if len(found) < 2:
            raise ValueError(f"the traces have {len(found)} spans of {name}: too few to fit its times")
    rows = step_rows(spans)
    costs = least_squares([row[:-1] for row in rows], [row.seconds for row in rows])
    encodes = [
        (span.amount, span.end - span.start - (overlap(span, spans.steps) if takes_turns else 0.0))
        for span in spans.encode
    ]
    encode = least_squares([(amount,) for amount, _ in encodes], [seconds for _, seconds in encodes])
    prompts = {span.request_ids[0]: span.amount for span in spans.tokenise}
    names = [span.request_ids[0] for span in spans.prepare]
    prepare = least_squares(
        [(prompts[name], megapixels.get(name, 0.0)) for name in names],
        [span.end - span.start for span in spans.prepare],
    )
    decode = least_squares(
        [(megapixels[span.request_ids[0]],) for span in spans.decode_picture],
        [span.end - span.start for span in spans.decode_picture],
    )
    return StageTimes(
        step=(
            StepCost(
                fixed_s=costs[0], decode_s=costs[1], context_s=costs[2], prefill_s=costs[3], pair_s=costs[4]
            ),
        ),
        encode=(EncodeCost(fixed_s=encode[0], patch_s=encode[1]),),
        prepare_s=prepare[0], prepare_token_s=prepare[1], prepare_megapixel_s=prepare[2],
        decode_picture_s=decode[0], decode_megapixel_s=decode[1],
        hand_off_s=hand_off_seconds(spans),
        between_s=between_seconds(spans),
        sharing="turns" if takes_turns else "own",
    )  # fmt: skip


def step_rows(spans: Spans) -> list[StepRow]:
    """What each step computed: of which requests it decoded, and how much of whose prompt it took.

    A step says how many tokens it had, not of whom: those that it did not decode are given to its requests in
    order, as far as their prompts go.
    """
    prompts = {span.request_ids[0]: span.amount for span in spans.tokenise}
    done: dict[str, int] = defaultdict(int)
    rows: list[StepRow] = []
    for span in spans.steps:
        ids = [one for one in span.request_ids if one in prompts]
        decodes = [one for one in ids if done[one] >= prompts[one]]
        left = num_prefill = max(0, span.amount - len(decodes))
        num_pairs = 0
        for one in ids:
            if done[one] < prompts[one]:
                taken = min(left, prompts[one] - done[one])
                num_pairs, left = num_pairs + taken * (done[one] + taken // 2), left - taken
                done[one] += taken
        num_context = sum(done[one] for one in decodes)
        for one in decodes:
            done[one] += 1
        rows.append(StepRow(len(decodes), num_context, num_prefill, num_pairs, span.end - span.start))
    return rows


def overlap(span: TraceSpan, others: Sequence[TraceSpan]) -> float:
    """Seconds of a span in which one of the others, which follow each other, went on."""
    seconds = 0.0
    first = max(0, bisect_left(others, span.start, key=lambda other: other.start) - 1)
    for other in others[first:]:
        if other.start >= span.end:
            break
        seconds += max(0.0, min(span.end, other.end) - max(span.start, other.start))
    return seconds


def hand_off_seconds(spans: Spans) -> float:
    """From the end of an encode to the step that reads it, where the LLM was idle meanwhile."""
    starts = [step.start for step in spans.steps]
    waits: list[float] = []
    for span in spans.encode:
        number = bisect_left(starts, span.end)
        was_idle = number == 0 or spans.steps[number - 1].end <= span.end
        if number < len(starts) and was_idle and set(span.request_ids) & set(spans.steps[number].request_ids):
            waits.append(starts[number] - span.end)
    return float(np.median(waits)) if waits else 0.0


def between_seconds(spans: Spans) -> float:
    """From the end of a step to the start of the next one for the same requests, while no ViT computes."""
    gaps: list[float] = []
    for step, after in zip(spans.steps, spans.steps[1:], strict=False):
        gap = after.start - step.end
        between = TraceSpan("", step.end, max(after.start, step.end), ())
        is_next = 0 <= gap < LONGEST_BETWEEN_S and set(step.request_ids) & set(after.request_ids)
        if is_next and not overlap(between, spans.encode):
            gaps.append(gap)
    return float(np.mean(gaps)) if gaps else 0.0


def least_squares(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The constant and a factor for each column, none of them negative.

    Rows are weighted by one over their seconds, so that the sum of all that is predicted is about the sum of
    what was measured, and short pieces of work count as long ones do together.
    """
    wanted = np.array(seconds, np.float64)
    given: Array = np.column_stack([np.ones(len(wanted)), np.array(columns, np.float64)])
    weights = 1 / np.sqrt(np.maximum(wanted, 1e-9))
    kept = list(range(given.shape[1]))
    factors = np.zeros(given.shape[1])
    while kept:
        scale = np.maximum(np.abs(given[:, kept]).max(axis=0), 1e-12)  # columns differ by many orders
        found = np.linalg.lstsq(given[:, kept] / scale * weights[:, None], wanted * weights, rcond=None)[0]
        if found.min() >= 0:
            factors[kept] = found / scale
            break
        kept.pop(int(found.argmin()))
    return [float(factor) for factor in factors]
