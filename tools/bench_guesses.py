"""What guesses by a model's own head cost: a step that verifies and makes some, beside one without.

    python -m tools.bench_guesses --shape qwen3.5-0.8b

In process, on all cores that torch takes, with random weights of the shape: speed does not depend on their
values. Sequences decode behind a context. Told are the median milliseconds of a step, and from which share of
right guesses it pays, if each is as likely to be right as the others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import read_model_info
from pipeline.wire.base import Origin
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep, StepPlan
from pipeline.wire.topology import Role, WorkerId
from tools.random_checkpoint import SHAPES, make_checkpoint
from workers.llm.model_runner import ModelRunner
from workers.llm.parallel import TensorParallel

ORIGIN: Origin = {"sender": WorkerId(Role.LLM), "epoch": 1}
BLOCK, MAX_DRAFTS = 16, 15
GREEDY = SamplingParams(temperature=0, ignore_eos=True, seed=1)
NUM_WARM_UPS = 3


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
    options = parser.parse_args()
    if options.sequences * max(options.guesses) > MAX_DRAFTS:
        parser.error(f"a step has at most {MAX_DRAFTS} guesses")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.folder is None:
            make_checkpoint(folder, options.shape)
        num_steps = (len(options.guesses) + 1) * (options.steps + NUM_WARM_UPS)
        decoding = Decoding(folder, options.dtype, options.sequences, options.context, num_steps)
        report(decoding, options.guesses, options.steps)


if __name__ == "__main__":
    main()
