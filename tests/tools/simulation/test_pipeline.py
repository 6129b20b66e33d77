"""The pipeline in simulated time: all that goes in comes out once, and queues are as theory says."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from pipeline.families import ModelInfo
from pipeline.wire.base import ChunkKey
from tools.simulation.load import Camera, Load, Shape, Submission, random_load
from tools.simulation.pipeline import Pipeline, Settings, Simulated, Size, simulate
from tools.simulation.report import Summary, summarize
from tools.simulation.stages import EncodeCost, StageTimes, StepCost

TIMES = StageTimes(
    step=(StepCost(fixed_s=0.01, decode_s=0.0005, prefill_s=0.0001, pair_s=1e-8),),
    encode=(EncodeCost(fixed_s=0.002, patch_s=1e-4),),
    prepare_s=0.001, decode_picture_s=0.004, decode_megapixel_s=0.02, hand_off_s=0.0005, front_s=0.002,
    between_s=0.0002,
)  # fmt: skip
ONE = Size()
PICTURES = Shape(60, 40, 8, ((224, 224), (448, 336)), num_pictures=2)


def load(
    info: ModelInfo, shape: Shape = PICTURES, seed: int = 1, rate: float = 0.0, concurrency: int = 0
) -> Load:
    return random_load(shape, Camera(info), random.Random(seed), rate, concurrency)


def run(
    info: ModelInfo, given: Load, times: StageTimes = TIMES, size: Size = ONE, **settings: int
) -> Simulated:
    return simulate(times, info, size, Settings(**settings), given)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [Size(), Size(num_vits=3, num_readers=2, num_groups=2)])
@pytest.mark.parametrize("asked", [{"rate": 20.0}, {"concurrency": 6}])
def test_each_request_finishes_once_and_nothing_is_held(
    info: ModelInfo, size: Size, asked: dict[str, float]
) -> None:
    """`simulate` checks slots, leases and blocks itself."""
    given = load(info, **asked)  # type: ignore[arg-type]
    found = run(info, given, size=size)
    assert [len(one.arrivals) for one in found.outcomes] == [PICTURES.num_output] * PICTURES.num_requests
    assert all(one.sent < one.arrivals[0] and one.arrivals == sorted(one.arrivals) for one in found.outcomes)
    num_encoded = sum(len(one.pictures) for one in given.submissions)
    readers, vits, _ = found.stages
    assert len(readers.spans) == num_encoded
    per_patch = TIMES.encode[0].patch_s * sum(
        picture.grid.num_patches for one in given.submissions for picture in one.pictures
    )
    assert per_patch < vits.seconds <= per_patch + num_encoded * TIMES.encode[0].fixed_s + 1e-6
    assert all(stage.utilisation(found.wall) <= 1 for stage in found.stages)


def test_the_same_seed_gives_the_same_run(info: ModelInfo) -> None:
    one, same, other = (run(info, load(info, seed=seed, rate=20.0)) for seed in (1, 1, 2))
    assert one.outcomes == same.outcomes
    assert one.outcomes != other.outcomes


def test_a_request_alone_takes_the_sum_of_its_stages(info: ModelInfo) -> None:
    camera = Camera(info)
    picture = camera.picture(448, 448, "one")
    found = run(info, Load([Submission(0, 0.0, 40, 3, (picture,))]), max_itl_stretch=0)
    (outcome,) = found.outcomes
    num_tokens = 40 + picture.num_tokens
    step = TIMES.step_seconds(0, 0, num_tokens, num_tokens * (num_tokens // 2))
    encode = TIMES.encode_seconds([picture.grid.num_patches])
    decode = TIMES.decode_picture_s + TIMES.decode_megapixel_s * picture.megapixels
    expected = TIMES.front_s + TIMES.prepare_s + decode + encode + TIMES.hand_off_s + step
    assert outcome.ttft == pytest.approx(expected)
    assert outcome.gaps == pytest.approx([TIMES.between_s + 0.0105] * 2)


def test_a_queue_before_one_server_waits_as_md1_says(info: ModelInfo) -> None:
    """Poisson arrivals at one ViT, one picture each, of one size, in batches of one.

    Each waits as Lindley's recursion says of these arrivals; and the mean wait in an M/D/1 queue is
    rho · s / 2 (1 - rho) (Pollaczek and Khinchine), of which this is a sample.
    """
    seconds, rho, num_requests = 0.05, 0.5, 1000
    times = StageTimes(step=(StepCost(fixed_s=1e-7),), encode=(EncodeCost(fixed_s=seconds),), kv_blocks=4096)
    shape = Shape(num_requests, 8, 1, ((224, 224),), num_pictures=1)
    given = load(info, shape, seed=3, rate=rho / seconds)
    found = run(info, given, times, vit_max_batch_patches=1)
    waits = [one.ttft - seconds for one in found.outcomes]
    expected, arrivals = [0.0], [one.at for one in given.submissions]
    for before, after in itertools.pairwise(arrivals):
        expected.append(max(0.0, expected[-1] + seconds - (after - before)))
    assert waits == pytest.approx(expected, abs=1e-5)
    assert sum(waits) / num_requests == pytest.approx(rho * seconds / (2 * (1 - rho)), rel=0.2)
    assert found.stages[1].utilisation(found.wall) == pytest.approx(rho, rel=0.1)


def test_more_vits_never_worsen_the_first_token_where_vits_are_short(info: ModelInfo) -> None:
    given = load(info, rate=12.0)
    slow = msgspec.structs.replace(TIMES, encode=(EncodeCost(patch_s=2e-4),))
    medians = [summarize(run(info, given, slow, Size(num_vits=count))).ttft_p50 for count in (1, 2, 4)]
    assert medians == sorted(medians, reverse=True)
    assert medians[0] > 2 * medians[-1], "with one the ViT is the bottleneck"


def test_more_readers_and_more_groups_help_where_they_are_short(info: ModelInfo) -> None:
    given = load(info, rate=20.0)
    fast_vit = msgspec.structs.replace(TIMES, encode=(EncodeCost(patch_s=1e-6),))
    slow = msgspec.structs.replace(fast_vit, decode_picture_s=0.08)
    assert ttft(info, given, slow, Size(num_readers=8)) < ttft(info, given, slow, Size(num_readers=2)) / 2
    slow = msgspec.structs.replace(fast_vit, step=(StepCost(fixed_s=0.02, prefill_s=0.0005),))
    assert ttft(info, given, slow, Size(num_groups=4)) < ttft(info, given, slow, Size()) / 2


def ttft(info: ModelInfo, given: Load, times: StageTimes, size: Size) -> float:
    return summarize(run(info, given, times, size)).ttft_p50


def test_a_picture_that_was_seen_is_neither_decoded_nor_encoded_again(info: ModelInfo) -> None:
    shape = PICTURES._replace(num_shared_pictures=2)
    found = run(info, load(info, shape, concurrency=1))
    assert len(found.stages[0].spans) <= 2


def test_shared_beginnings_are_computed_once_and_draw_requests_to_their_group(info: ModelInfo) -> None:
    shape = Shape(40, 600, 4, num_shared_tokens=512)
    times = [
        llm_seconds(info, load(info, one, rate=5.0)) for one in (shape, shape._replace(num_shared_tokens=0))
    ]
    assert times[0] < 0.5 * times[1]


def llm_seconds(info: ModelInfo, given: Load) -> float:
    times = msgspec.structs.replace(TIMES, step=(StepCost(prefill_s=0.0001, decode_s=1e-6),))
    return run(info, given, times, Size(num_groups=2)).stages[2].seconds


def test_preempted_requests_finish_too(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose pictures the ViT has evicted meanwhile."""
    gone: list[ChunkKey] = []
    encode_again = Pipeline.on_lease_gone

    def on_lease_gone(pipeline: Pipeline, key: ChunkKey) -> None:
        gone.append(key)
        encode_again(pipeline, key)

    monkeypatch.setattr(Pipeline, "on_lease_gone", on_lease_gone)
    small = msgspec.structs.replace(TIMES, kv_blocks=90)
    shape = PICTURES._replace(num_output=120)
    found = run(info, load(info, shape, rate=100.0), small, embedding_pool_mib=1)
    assert found.num_preempted
    assert gone


def test_a_request_that_cannot_run_is_told(info: ModelInfo) -> None:
    tiny = msgspec.structs.replace(TIMES, kv_blocks=2)
    with pytest.raises(RuntimeError, match="does not fit into the KV cache"):
        run(info, load(info, rate=1.0), tiny)


def test_turns_pause_the_vit_while_steps_run(info: ModelInfo) -> None:
    """On the same cores no ViT works during a step; on cores of its own one does."""
    shape = Shape(30, 40, 24, ((448, 448),), num_pictures=1)
    given = load(info, shape, concurrency=6)
    overlaps = []
    for sharing in ("turns", "own"):
        _, vits, llm = run(info, given, msgspec.structs.replace(TIMES, sharing=sharing)).stages
        shared = [
            min(end, other_end) - max(start, other_start)
            for _, start, end in vits.spans
            for _, other_start, other_end in llm.spans
        ]
        overlaps.append(sum(seconds for seconds in shared if seconds > 0))
    assert overlaps[0] == pytest.approx(0.0, abs=1e-9)
    assert overlaps[1] > 0.1
    with pytest.raises(ValueError, match="take turns on the same cores"):
        Pipeline(msgspec.structs.replace(TIMES, sharing="turns"), info, Size(num_vits=2), Settings(), given)


def test_streams_are_protected_from_prompts(info: ModelInfo) -> None:
    """By the server's own bound on a step's stretch: without it prompts halt the streams."""
    shape = Shape(40, 1500, 30)
    given = load(info, shape, rate=4.0)
    bound, free = (summary(info, given, stretch) for stretch in (1.25, 0))
    assert bound.itl_p99 < 0.5 * free.itl_p99


def summary(info: ModelInfo, given: Load, stretch: float) -> Summary:
    return summarize(simulate(TIMES, info, Size(), Settings(max_itl_stretch=stretch), given))
