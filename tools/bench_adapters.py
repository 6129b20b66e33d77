"""What LoRA adapters cost a decode step: requests with several adapters in one batch, beside the same batch
without.

    python -m tools.bench_adapters                        # 0.31 B parameters, 3 adapters of rank 16
    python -m tools.bench_adapters --shape 2b --layers 8

In process, without scheduler and sockets; a context of 1024 tokens. Weights are random: speed does not depend
on their values. A step without adapters computes what a server without `--lora` computes. Rounds are
interleaved, since shared machines drift: what counts is the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.random_checkpoint.lora import write_adapter
from tools.runners import decode_seconds, open_runner
from workers.llm.model_runner import ModelRunner

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--layers", type=int, help="of the text, instead of the shape's own")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make_checkpoint(folder, args.shape, num_layers=args.layers)
        found = [
            write_adapter(folder, Path(place) / str(number), args.rank) for number in range(args.adapters)
        ]
        lora = tuple(f"{one.name}={one}" for one in found)
        options = {"quantization": args.quantization}
        with open_runner(folder, CPU, args.dtype, args.requests, lora, **options) as runner:
            measure(runner, args.requests, args.adapters, args.rounds)


def measure(runner: ModelRunner, num_requests: int, num_adapters: int, num_rounds: int) -> None:
    every = [number % num_adapters for number in range(num_requests)]
    ratios, without, with_adapters = list[float](), list[float](), list[float]()
    for _ in range(num_rounds):
        without.append(decode_seconds(runner, num_requests, 8))
        with_adapters.append(decode_seconds(runner, num_requests, 8, adapters=every))
        ratios.append(with_adapters[-1] / without[-1])
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    before, after = (1000 * statistics.median(times) for times in (without, with_adapters))
    print(f"{num_requests} requests: {before:.1f} ms a step, with {num_adapters} adapters {after:.1f} ms")
    print(f"ratio, round by round: {shown}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
