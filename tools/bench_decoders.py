"""Decoders of several shapes beside each other: decode steps by the bytes that they read, prefill by its
arithmetic.

    python -m tools.bench_decoders 2b qwen3-vl-2b            # the second beside the first
    python -m tools.bench_decoders 2b qwen3-vl-2b --layers 9 # with less memory

Weights are random: speed does not depend on their values. Rounds are interleaved and medians are told, since
shared machines drift. Each ratio is a shape's rate over the first shape's.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
from pathlib import Path

import torch

from pipeline.families import read_model_info
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.runners import (
    CONTEXT,
    decode_seconds,
    kv_bytes,
    num_weights,
    open_runner,
    prefill_flops,
    prefill_seconds,
    weight_size,
)
from workers.llm.model_runner import ModelRunner
from workers.nn.loader import choose_dtype

CPU = torch.device("cpu")
LENGTH = 512  # of a prompt
BATCHES = (1, 8)
NUM_STEPS = 8


class Bench:
    """One shape, with arithmetic in `dtype`."""

    def __init__(self, runner: ModelRunner, folder: Path, dtype: torch.dtype) -> None:
        self._runner, self._info = runner, read_model_info(folder).text
        self._weight_bytes = num_weights(self._info) * weight_size(folder, dtype)
        self._kv_bytes = CONTEXT * kv_bytes(self._info, dtype.itemsize)

    def rates(self) -> dict[str, float]:
        """GB/s and GFLOP/s by the name of the work, of one round."""
        found = {}
        for batch in BATCHES:
            nbytes = self._weight_bytes + batch * self._kv_bytes
            found[f"decode {batch}, GB/s"] = nbytes / decode_seconds(self._runner, batch, NUM_STEPS) / 1e9
        flops = prefill_flops(self._info, LENGTH)
        found[f"prefill {LENGTH}, GFLOP/s"] = flops / prefill_seconds(self._runner, LENGTH) / 1e9
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES), metavar="SHAPE")
    parser.add_argument("--layers", type=int, help="of each shape; all if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args()
    dtype = choose_dtype(options.dtype, CPU)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")
    with contextlib.ExitStack() as stack:
        benches = {}
        for shape in options.shapes:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_checkpoint(folder, shape, num_layers=options.layers)
            name = str(dtype).removeprefix("torch.")
            runner = stack.enter_context(open_runner(folder, CPU, name, max(BATCHES)))
            benches[shape] = Bench(runner, folder, dtype)
        found: dict[tuple[str, str], list[float]] = {}
        for number in range(options.rounds + 1):
            for shape, bench in benches.items():
                for work, rate in bench.rates().items():
                    if number:  # the first round warms up
                        found.setdefault((work, shape), []).append(rate)
    medians = {key: statistics.median(rates) for key, rates in found.items()}
    print("\n| work | shape | rate | ratio |\n| --- | --- | --- | --- |")
    for (work, shape), rate in sorted(medians.items(), key=lambda item: item[0][0]):
        print(f"| {work} | {shape} | {rate:.1f} | {rate / medians[work, options.shapes[0]]:.2f} |")


if __name__ == "__main__":
    main()
