"""What rank 0 does in a step beside the model: plan, bookkeeping, outputs. The runner returns at once.

    python -m tools.bench_step --sequences 1 64 512

Each of so many sequences has a context of 8k tokens and decodes. Printed are, per step, the median
microseconds of `Engine.step`, and the bytes and microseconds of its plan for another rank.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from pipeline.process.flight_recorder import digest_of
from pipeline.transport.ends import Subscription
from pipeline.wire.base import Origin
from pipeline.wire.clients import PROTOCOL_VERSION, Hello, OutputsMessage, Welcome
from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import StepPlan, StepsMessage
from pipeline.wire.topology import Role, WorkerId
from workers.llm.cache.manager import CacheManager
from workers.llm.engine import Engine, Links
from workers.llm.scheduler import Scheduler
from workers.llm.step_result import StepResult
from workers.llm.stepping import Watch

CLIENT = b"c" * 16
BLOCK_SIZE = 16
BUDGET = 8192
LLM, PREPROCESS = WorkerId(Role.LLM), WorkerId(Role.PREPROCESS)


class Done:
    """A step that has run: token 7 for each sampled sequence."""

    has_run = True

    def __init__(self, num_sampled: int) -> None:
        self._result = StepResult([[7]] * num_sampled, [()] * num_sampled)

    def result(self) -> StepResult:
        return self._result


class NoPools:
    """There are no pictures."""

    def open(self, info: object) -> None:
        raise AssertionError("no pool is opened")

    def close(self, pool_id: str) -> None:
        raise AssertionError("no pool is closed")

    def knows(self, pool_id: str, epoch: int) -> bool:
        return False


class Runner:
    """Computes nothing, and keeps the last plan."""

    def __init__(self) -> None:
        self.pools = NoPools()
        self.plan: StepPlan | None = None

    def launch(self, plan: StepPlan) -> Done:
        self.plan = plan
        return Done(sum(sequence.is_sampled for sequence in plan.sequences))

    def choose(self, masks: Sequence[bytes]) -> None:
        raise AssertionError("no token waits for a mask")


class NoSink:
    def send(self, message: object, frames: Sequence[bytes | memoryview] = ()) -> None:
        pass


class Measured(NamedTuple):
    num_sequences: int
    step_us: float  # median of Engine.step
    plan_bytes: int  # median of a plan on the wire between ranks
    plan_us: float  # median of encoding and decoding it


def make_engine(num_sequences: int, max_model_len: int, runner: Runner) -> Engine:
    num_blocks = num_sequences * (max_model_len // BLOCK_SIZE + 2)
    scheduler = Scheduler(CacheManager.of_size(num_blocks, BLOCK_SIZE, num_sequences), BUDGET, (1,))
    welcome = Welcome(
        sender=LLM, epoch=1, protocol=PROTOCOL_VERSION, model_folder="", tokenizer_hash=b"", model_name="m",
        max_model_len=max_model_len, max_requests=num_sequences, max_request_bytes=1,
    )  # fmt: skip

    def publish(message: OutputsMessage, topic: bytes) -> bool:
        return True

    def record(request_ids: Any) -> None:
        """What the flight recorder does, but for its write."""
        for request_id in request_ids:
            digest_of(request_id)

    links = Links(publish=publish, feedback=NoSink(), vits=[])
    origin: Origin = {"sender": LLM, "epoch": 1}
    engine = Engine(origin, scheduler, runner, welcome, links, watch=Watch(record=record))
    engine.on_subscriptions([Subscription(CLIENT, True)], 0.0)
    engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), 0.0)
    return engine


def submit(engine: Engine, number: int, context: int, num_output: int) -> None:
    """A text of `context` tokens like no other's."""
    rng = random.Random(number)
    prompt = [rng.randrange(100, 30_000) for _ in range(context)]
    sampling = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, seed=1)
    request = GenerateRequest(
        sender=PREPROCESS,
        epoch=1,
        client_id=CLIENT,
        request_id=f"request-{number}",
        attempt=1,
        arrival=number + 1,
        prompt_token_ids=pack_int32(prompt),
        positions=pack_int32([*range(context)] * 3),
        position_delta=0,
        items=(),
        sampling=sampling,
    )
    engine.handle(request, 0.0)


def measure(num_sequences: int, context: int, num_steps: int) -> Measured:
    """All sequences are prefilled first; then `num_steps` steps in which all decode are timed."""
    runner = Runner()
    # The first decodes while the others are prefilled: a step or two for each of them.
    num_output = num_steps + 2 * num_sequences * -(-context // BUDGET) + 64
    engine = make_engine(num_sequences, context + num_output, runner)
    for number in range(num_sequences):
        submit(engine, number, context, num_output)
    while any(one.num_remaining_tokens > 1 for each in engine.requests.values() for one in each.open):
        engine.step(0.0)
    steps: list[float] = []
    codecs: list[float] = []
    sizes: list[int] = []
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(StepsMessage)
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step(0.0)
        steps.append(time.perf_counter() - start)
        assert runner.plan is not None
        assert len(runner.plan.sequences) == num_sequences, "all decode"
        start = time.perf_counter()
        data = encoder.encode(runner.plan)
        decoder.decode(data)
        codecs.append(time.perf_counter() - start)
        sizes.append(len(data))
    step_us, plan_us = (1e6 * statistics.median(seconds) for seconds in (steps, codecs))
    return Measured(num_sequences, step_us, int(statistics.median(sizes)), plan_us)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--context", type=int, default=8192, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=200, help="steps that are timed")
    options = parser.parse_args()
    print("sequences   us a step   us a sequence   bytes of its plan   us to encode and decode it")
    for num_sequences in options.sequences:
        found = measure(num_sequences, options.context, options.steps)
        each = found.step_us / num_sequences
        row = (found.num_sequences, found.step_us, each, found.plan_bytes, found.plan_us)
        print("{:9d} {:11.0f} {:15.2f} {:19d} {:28.0f}".format(*row))


if __name__ == "__main__":
    main()
