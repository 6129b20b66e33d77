"""The LLM's engine and a ViT's batcher together, each real, with tiny pools: whatever comes in whatever
order, everything ends.

Places for embeddings are granted by arrival, KV blocks by priority and shared prefix; who holds one may wait
for the other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from pipeline.families import EmbeddingSpec
from pipeline.transport.ends import Subscription
from pipeline.transport.slots import ALIGNMENT, SlotAllocator
from pipeline.wire.base import ChunkKey, GridTHW, Order
from pipeline.wire.clients import (
    PROTOCOL_VERSION,
    AbortRequest,
    ChoiceProgress,
    Hello,
    Interrupted,
    RequestOutput,
    TokenOutputs,
    Welcome,
)
from pipeline.wire.encoding import ItemNotNeeded, LeaseReleased, LeaseRequest
from pipeline.wire.generation import EmbeddingReady, GenerateRequest, LeaseRefused, MmChunk, MmItem, Span
from pipeline.wire.handles import TensorHandle
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import StepPlan
from tests.fakes import LLM_0, PREPROCESS, VIT_0, FakePublisher, FakeSink
from workers.llm.cache.manager import CacheManager
from workers.llm.engine import Engine, Links
from workers.llm.scheduler import Scheduler
from workers.llm.step_result import StepResult
from workers.vit.batcher import Action, Batcher, LeaseGone, NeedPixels, Ready

CLIENT = b"c" * 16
PIXELS = TensorHandle("preprocess.0", 1, 0, 1, 0, (1, 56, 56, 3), "uint8")


def grid_of(item: MmItem) -> GridTHW:
    return GridTHW(1, 2, 2 * item.chunks[0].num_tokens)


class Runner:
    """Computes nothing."""

    def __init__(self) -> None:
        self.pools: Any = SimpleNamespace(knows=lambda *_: True)

    def launch(self, plan: StepPlan) -> Any:
        count = sum(sequence.is_sampled for sequence in plan.sequences)
        return SimpleNamespace(has_run=True, result=lambda: StepResult([[1]] * count, [()] * count))

    def choose(self, masks: Sequence[bytes]) -> None:
        raise AssertionError("no token waits for a mask")


class Size(NamedTuple):
    """Of the caches, of a step, and of pictures."""

    num_blocks: int
    block_size: int
    num_slots: int
    step_tokens: int
    pool_tokens: int
    picture_tokens: tuple[int, int] = (4, 4)  # least and most
    # Of layers with states:
    prefill_multiple: int = 1
    num_snapshots: int = 0


def tiny(rng: random.Random) -> Size:
    return Size(rng.randint(14, 40), 4, rng.randint(1, 4), step_tokens=16, pool_tokens=4 * rng.randint(2, 5))


class World:
    """Preprocess and the clients are played: pixels come at once, an interrupted request is submitted
    again."""

    def __init__(self, rng: random.Random, has_overlap: bool, size: Size | None = None) -> None:
        self.rng = rng
        size = tiny(rng) if size is None else size
        self.picture_tokens = size.picture_tokens
        self.publisher, self.feedback, self.vit, self.runner = (
            FakePublisher(),
            FakeSink(),
            FakeSink(),
            Runner(),
        )
        scheduler = Scheduler(
            CacheManager.of_size(
                size.num_blocks, size.block_size, size.num_slots, has_states=size.prefill_multiple > 1,
                num_snapshots=size.num_snapshots,
            ),
            size.step_tokens, (7,), has_prefix_cache=rng.random() < 0.7,
            prefill_multiple=size.prefill_multiple,
        )  # fmt: skip
        welcome = Welcome(
            sender=LLM_0, epoch=1, protocol=PROTOCOL_VERSION, model_folder="", tokenizer_hash=b"",
            model_name="m",
            max_model_len=size.num_blocks * size.block_size, max_requests=9, max_request_bytes=9,
        )  # fmt: skip
        self.engine = Engine(
            {"sender": LLM_0, "epoch": 1}, scheduler, self.runner, welcome,
            Links(publish=self.publisher, feedback=self.feedback, vits=[self.vit]), has_overlap=has_overlap,
        )  # fmt: skip
        self.engine.on_subscriptions([Subscription(CLIENT, True)], 0.0)
        self.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), 0.0)
        width = ALIGNMENT // 4
        allocator = SlotAllocator(size.pool_tokens * width, size.picture_tokens[1] * width, 64)
        self.batcher = Batcher(allocator, lambda grid: EmbeddingSpec(grid.num_patches // 4, width, "uint8"))
        self.arrivals = itertools.count(1)
        self.open: dict[str, GenerateRequest] = {}
        self.num_outputs: dict[str, int] = {}
        self.num_interrupted = self.num_encodes = self.num_turns = 0

    def submit(
        self,
        name: str,
        request: GenerateRequest | None = None,
        num_pictures: int | None = None,
        shared_rate: float = 0.2,
    ) -> None:
        arrival = next(self.arrivals)
        if request is None:
            shared = [self.rng.choice((3, 4))] * self.rng.choice((0, 8))
            items: list[MmItem] = []
            offset = len(shared) + 2
            for _ in range(self.rng.randint(0, 4) if num_pictures is None else num_pictures):
                count = self.rng.randint(*self.picture_tokens)
                is_shared = self.rng.random() < shared_rate
                mm_hash = f"shared.{count}".encode() if is_shared else f"{name}.{offset}".encode()
                chunks = (MmChunk(mm_hash, count, 0, 1),)
                items.append(MmItem((Span(offset, count),), mm_hash, mm_hash, chunks))
                offset += count + 1
            tokens = [*shared, *(self.rng.randint(10, 99) for _ in range(offset + 1 - len(shared)))]
            sampling = SamplingParams(
                temperature=0, seed=1, max_tokens=self.rng.randint(1, 16), ignore_eos=True
            )
            request = GenerateRequest(
                sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id=name, attempt=1, arrival=arrival,
                prompt_token_ids=pack_int32(tokens),
                positions=pack_int32(list(range(len(tokens))) * 3), position_delta=0,
                items=tuple(items), sampling=sampling, priority=self.rng.choice((0, 0, -1, 1)),
                tenant=self.rng.choice(("a", "a", "b", "c")),
            )  # fmt: skip
        self.open[name] = request
        self.engine.handle(request, 0.0)
        for number, item in enumerate(request.items):
            key = ChunkKey(name, request.attempt, number, 0)
            order = Order(request.arrival, number)
            self.act(
                self.batcher.on_request(key, order, item.mm_hash, grid_of(item), None, tenant=request.tenant)
            )

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Ready(key, lease_id, feature):
                    handle = TensorHandle("vit.0", 1, feature.slot.index, 1, 0, (4, 8), "float32")
                    self.engine.handle(
                        EmbeddingReady(
                            sender=VIT_0,
                            epoch=1,
                            key=key,
                            lease_id=lease_id,
                            embeddings=handle,
                            was_encoded=True,
                        ),
                        0.0,
                    )
                case NeedPixels(key):
                    request = self.open.get(key.request_id)
                    if request is not None and request.attempt == key.attempt:
                        item = request.items[key.item]
                        self.act(
                            self.batcher.on_request(
                                key, Order(request.arrival, key.item), item.mm_hash, grid_of(item), PIXELS
                            )
                        )
                case LeaseGone(key):
                    self.engine.handle(LeaseRefused(sender=VIT_0, epoch=1, key=key), 0.0)

    def turn(self, llm_each: int = 1, vit_each: int = 1) -> None:
        """Everybody does what he can; who is slow computes in each so manieth turn only, and hears everything
        all the same."""
        self.num_turns += 1
        if self.num_turns % llm_each == 0:
            self.engine.step(0.0)
        self.engine.check_integrity()
        for message in self.vit.take():
            match message:
                case LeaseReleased(lease_ids=lease_ids):
                    self.batcher.cache.release(lease_ids)
                    self.act(self.batcher.poll())
                case LeaseRequest(key=key, mm_hash=mm_hash):
                    self.act(self.batcher.on_lease_request(key, mm_hash))
        for message in self.feedback.take(ItemNotNeeded):
            self.act(self.batcher.on_cancel([ChunkKey(message.request_id, message.attempt, message.item, 0)]))
        if self.num_turns % vit_each == 0:
            batch = self.batcher.next_batch(self.rng.choice((16, 64)))
            self.num_encodes += len(batch)
            self.act(self.batcher.on_encoded(batch))
        for message in self.publisher.take(TokenOutputs):
            for output in message.outputs:
                self.on_output(output)
        for message in self.publisher.take(Interrupted):
            self.num_interrupted += 1
            request = self.open[message.request_id]
            self.cancel(request)
            tokens = pack_int32([1] * self.num_outputs.get(message.request_id, 0))
            changes = {
                "attempt": request.attempt + 1,
                "arrival": next(self.arrivals),
                "choices": (ChoiceProgress(tokens),),
            }
            self.submit(
                message.request_id,
                GenerateRequest(**{**{f: getattr(request, f) for f in request.__struct_fields__}, **changes}),
            )
        self.publisher.published.clear()
        self.batcher.check_integrity()

    def on_output(self, output: RequestOutput) -> None:
        self.num_outputs[output.request_id] = output.offset + len(output.new_token_ids) // 4
        if (
            output.finish_reason is not None
            and (request := self.open.pop(output.request_id, None)) is not None
        ):
            self.cancel(request)

    def cancel(self, request: GenerateRequest) -> None:
        self.act(
            self.batcher.on_cancel(
                [
                    ChunkKey(request.request_id, request.attempt, number, 0)
                    for number in range(len(request.items))
                ]
            )
        )

    def abort(self, name: str) -> None:
        self.engine.handle(
            AbortRequest(client_id=CLIENT, request_id=name, attempt=self.open[name].attempt), 0.0
        )

    def finish(self, max_turns: int, name: object, llm_each: int = 1, vit_each: int = 1) -> None:
        """Until nobody waits; then every lease must have come back."""
        for _ in range(max_turns):
            if not self.open:
                break
            self.turn(llm_each, vit_each)
        assert not self.open, f"{name}: {sorted(self.open)} wait for ever"
        for _ in range(3):
            self.turn()
        assert self.batcher.cache.num_leases == 0, f"{name}: leases are held for nobody"


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_everything_ends_whatever_holds_what(has_overlap: bool) -> None:
    num_preempted = num_interrupted = 0
    for seed in range(120):
        world = World(random.Random(seed), has_overlap)
        names = [f"r{number}" for number in range(12)]
        for name in names:
            world.submit(name)
            for _ in range(world.rng.choice((0, 0, 1, 5))):
                world.turn()
            if world.open and world.rng.random() < 0.15:
                world.abort(world.rng.choice(sorted(world.open)))
        world.finish(3000, seed)
        num_preempted += world.engine.scheduler.num_preemptions
        num_interrupted += world.num_interrupted
    assert num_preempted > 20, "else this shows little"
    assert num_interrupted > 5


@pytest.mark.parametrize("step_tokens", [1, 64, 200])
def test_a_lease_waits_for_no_later_picture_where_prefills_are_cut_at_windows(step_tokens: int) -> None:
    """Windows of 64 tokens may hold several pictures, of which the pool holds two."""
    size = Size(
        num_blocks=60, block_size=16, num_slots=3, step_tokens=step_tokens, pool_tokens=2 * 132,
        picture_tokens=(1, 130), prefill_multiple=64, num_snapshots=3,
    )  # fmt: skip
    for seed in range(6 if step_tokens == 1 else 20):
        world = World(random.Random(seed), has_overlap=seed % 2 == 1, size=size)
        for number in range(8):
            world.submit(f"r{number}")
            for _ in range(world.rng.choice((0, 1, 20))):
                world.turn()
        world.finish(20_000, seed)


@pytest.mark.parametrize(("llm_each", "vit_each"), [(1, 25), (25, 1)], ids=["slow ViT", "slow LLM"])
def test_one_much_slower_than_the_other_holds_nothing_up_for_ever(llm_each: int, vit_each: int) -> None:
    for seed in range(10):
        world = World(random.Random(seed), has_overlap=True)
        for number in range(12):
            world.submit(f"r{number}")
            world.turn(llm_each, vit_each)
        world.finish(20_000, seed, llm_each, vit_each)


def test_a_thousand_requests_with_one_picture_share_one_encode() -> None:
    world = World(random.Random(1), has_overlap=True)
    for number in range(1000):
        world.submit(f"r{number}", num_pictures=1, shared_rate=1.0)
        if number % 7 == 0:
            world.turn()
    world.finish(20_000, "one picture")
    assert world.num_encodes == 1
