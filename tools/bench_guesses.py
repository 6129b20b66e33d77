"""What guesses by a model's own head cost: a step that verifies and makes some, beside one without.

    python -m tools.bench_guesses --shape qwen3.5-0.8b
    python -m tools.bench_guesses --shape qwen3.5-0.8b --served     # needs transformers (the extra `test`)

In process, on all cores that torch takes, with random weights of the shape: speed does not depend on their
values. Sequences decode behind a context. Told are the median milliseconds of a step, and from which share of
right guesses it pays, if each is as likely to be right as the others.

With `--served`, servers without guesses and with so many answer the same questions in turn, greedily and by
drawing, with weights whose head is mostly right (`tools/random_checkpoint/agreeing.py`). Told are the share
of guesses that were right, tokens/s of all answers together, and whether all texts are those without guesses,
which `--dtype float32` promises.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import read_model_info
from pipeline.wire.base import Origin
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep, StepPlan
from pipeline.wire.topology import Role, WorkerId
from tools.bench_engine import ALL_CORES, Served, raise_failed, serve
from tools.bench_serving import Body, Result, Workload, open_session, send
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.random_checkpoint.agreeing import make_agree
from workers.llm.model_runner import ModelRunner
from workers.llm.parallel import TensorParallel

ORIGIN: Origin = {"sender": WorkerId(Role.LLM), "epoch": 1}
BLOCK, MAX_DRAFTS = 16, 15
GREEDY = SamplingParams(temperature=0, ignore_eos=True, seed=1)
NUM_WARM_UPS, NUM_ROUNDS = 3, 3
MAX_WAIT_S = 30.0
SHARE = 0.02  # of what the rest of a text usually does to the next token


class Decoding:
    """Sequences of one runner that decode, with `num_guesses` guesses a step for each; 0: without a head."""

    def __init__(self, folder: Path, dtype: str, num_sequences: int, context: int, num_steps: int) -> None:
        info = read_model_info(folder)
        self._vocab_size = info.text.vocab_size
        self._rng, self._runners = np.random.default_rng(0), dict[bool, ModelRunner]()
        self._num_sequences = num_sequences
        # A step yields one token more than it has drafts, of which none is right here.
        num_tokens = context + (MAX_DRAFTS + 1) * num_steps
        for has_head in (False, True):
            llm = LlmConfig(block_size=BLOCK, speculative="mtp" if has_head else "none")
            config = Config(model=ModelConfig(dtype=dtype), llm=llm)
            runner = ModelRunner.load(
                info, config, folder, torch.device("cpu"), TensorParallel(), lambda done, total: None
            )
            num_blocks = -(-num_tokens // BLOCK)
            runner.open_cache(num_sequences * num_blocks, num_tokens, num_sequences, num_drafts=MAX_DRAFTS)
            self._runners[has_head] = runner
            for slot in range(num_sequences):
                prompt = self._tokens(context)
                table = range(slot * num_blocks, (slot + 1) * num_blocks)
                start = SequenceStart(slot, context, GREEDY, prompt, block_table=pack_int32(table))
                self._launch(runner, [SequenceStep(slot, context)], [start])

    def step(self, num_guesses: int) -> float:
        """Seconds of a step."""
        steps = [
            SequenceStep(slot, 1 + num_guesses, drafts=self._tokens(num_guesses), num_guesses=num_guesses)
            for slot in range(self._num_sequences)
        ]
        return self._launch(self._runners[num_guesses > 0], steps)

    def _launch(
        self, runner: ModelRunner, steps: Sequence[SequenceStep], started: Sequence[SequenceStart] = ()
    ) -> float:
        plan = StepPlan(step=0, started=tuple(started), sequences=tuple(steps), **ORIGIN)
        start = time.perf_counter()
        runner.launch(plan).result()
        return time.perf_counter() - start

    def _tokens(self, count: int) -> bytes:
        return pack_int32(self._rng.integers(self._vocab_size, size=count))


def share_to_pay(ratio: float, num_guesses: int) -> float | None:
    """p with 1 + p + p² + … + p^num_guesses = ratio; None: there is none up to 1."""
    if ratio > 1 + num_guesses:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**number for number in range(num_guesses + 1)) < ratio:
            low = middle
        else:
            high = middle
    return high


def report(decoding: Decoding, counts: Sequence[int], num_steps: int) -> None:
    seconds: dict[int, list[float]] = {count: [] for count in (0, *counts)}
    for _ in range(num_steps + NUM_WARM_UPS):
        for count, of_count in seconds.items():
            of_count.append(decoding.step(count))
    medians = {count: statistics.median(found[NUM_WARM_UPS:]) for count, found in seconds.items()}
    print("guesses   ms a step   beside none   pays from so many right")
    for count, median in medians.items():
        ratio = median / medians[0]
        share = share_to_pay(ratio, count) if count else None
        told = "-" if not count else "never" if share is None else f"{share:.0%}"
        print(f"{count:7d} {1000 * median:11.1f} {ratio:13.2f} {told:>25}")


class Answered(NamedTuple):
    texts: Sequence[str]
    tokens_per_s: float


def ask(served: Served, bodies: Sequence[Body], num_output: int) -> Answered:
    """The answers to all questions at once."""

    async def send_all() -> list[Result]:
        async with open_session() as session:
            return await asyncio.gather(*(send(session, served.url, body) for body in bodies))

    start = time.perf_counter()
    results = asyncio.run(send_all())
    seconds = time.perf_counter() - start
    raise_failed(results)
    return Answered([result.text for result in results], num_output * len(bodies) / seconds)


def share_right(served: Served, num_output: int) -> float:
    """Waits until the metrics count `num_output` tokens: workers tell their counts once a second."""
    deadline = time.monotonic() + MAX_WAIT_S
    while (counted := read_counts(served))["vlm_generation_tokens"] < num_output:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"of {num_output} tokens the metrics count {counted['vlm_generation_tokens']:.0f}"
            )
        time.sleep(0.1)
    return counted["vlm_spec_decode_num_accepted_tokens"] / counted["vlm_spec_decode_num_draft_tokens"]


def read_counts(served: Served) -> dict[str, float]:
    """Sums over all workers, by the counter's name without `_total`."""
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    counted = defaultdict[str, float](float)
    for line in lines:
        if not line.startswith("#"):
            counted[line.partition("{")[0].removesuffix("_total")] += float(line.split()[-1])
    return counted


def report_served(folder: Path, options: argparse.Namespace) -> None:
    questions = Workload(num_words=24, num_output=options.output_tokens).chats(
        options.sequences, random.Random(0)
    )
    print("guesses   right   tokens/s greedy   drawn   the same texts")
    plain: list[Sequence[str]] = []
    for count in (0, *options.guesses):
        guesses = ("--speculative", "mtp", "--speculative-tokens", str(count)) if count else ()
        with serve(folder, "--dtype", options.dtype, "--device", "cpu", *ALL_CORES, *guesses) as served:
            found = []
            for temperature in (0.0, 0.7):
                workload = Workload(num_output=options.output_tokens, temperature=temperature)
                bodies = [
                    workload.body([{"role": "user", "content": one}]) | {"seed": 1} for (one,) in questions
                ]
                rounds = [ask(served, bodies, options.output_tokens) for _ in range(NUM_ROUNDS)]
                rates = [one.tokens_per_s for one in rounds]
                found.append(Answered(rounds[0].texts, statistics.median(rates)))
            texts = [one.texts for one in found]
            plain = plain or texts
            num_output = 2 * NUM_ROUNDS * len(questions) * options.output_tokens
            right = f"{share_right(served, num_output):.0%}" if count else "-"
            greedy, drawn = (f"{one.tokens_per_s:.1f}" for one in found)
            told = "yes" if texts == plain else "no"
            print(f"{count:7d} {right:>7} {greedy:>17} {drawn:>7} {told:>16}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3.5-0.8b", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--steps", type=int, default=30, help="steps of each kind, one in turn")
    parser.add_argument("--folder", type=Path, help="of a checkpoint; otherwise one of the shape is made")
    parser.add_argument("--served", action="store_true", help="measure servers, not steps")
    parser.add_argument("--output-tokens", type=int, default=200, help="of an answer of a server")
    options = parser.parse_args()
    if options.sequences * max(options.guesses) > MAX_DRAFTS:
        parser.error(f"a step has at most {MAX_DRAFTS} guesses")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.folder is None:
            make_checkpoint(folder, options.shape)
        if options.served:
            if options.folder is None:
                make_agree(folder, SHARE)
            report_served(folder, options)
            return
        num_steps = (len(options.guesses) + 1) * (options.steps + NUM_WARM_UPS)
        decoding = Decoding(folder, options.dtype, options.sequences, options.context, num_steps)
        report(decoding, options.guesses, options.steps)


if __name__ == "__main__":
    main()
