"""A decoder's steps and a tower's pictures on the CPU: with the compiled kernels, with torch's operators, and
with fewer bits.

    python -m tools.bench_kernels                   # 0.31 B parameters
    python -m tools.bench_kernels --shape 2b --layers 8
    python -m tools.bench_kernels --work picture    # towers alone

In process, without scheduler and sockets; a context of 1024 tokens. Weights are random: speed does not depend
on their values. Rounds are interleaved and medians are told, since shared machines drift. A step of one
request reads all weights once: the last line says at which share of the memory's rate
(`tools/memory_rate.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.families import read_model_info
from pipeline.wire.base import GridTHW
from tools.memory_rate import memory_rate
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.runners import (
    CONTEXT,
    decode_seconds,
    kv_bytes,
    num_weights,
    open_runner,
    prefill_seconds,
    weight_size,
)
from workers.llm.model_runner import ModelRunner
from workers.nn.loader import choose_dtype
from workers.nn.native import operators
from workers.nn.weights.registry import open_weights
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.registry import tower_of

CPU = torch.device("cpu")


class Subject(NamedTuple):
    """One way to compute."""

    runner: ModelRunner
    tower: TorchEngine


WORK: dict[str, Callable[[Subject], float]] = {
    "decode, 1 request": lambda subject: decode_seconds(subject.runner, 1, 16),
    "decode, 8 requests": lambda subject: decode_seconds(subject.runner, 8, 12),
    "prefill, 512 tokens": lambda subject: prefill_seconds(subject.runner, 512),
    "prefill, 2048 tokens": lambda subject: prefill_seconds(subject.runner, 2048),
    "picture, 1024 patches": lambda subject: tower_seconds(subject.tower, 32),
    "picture, 4096 patches": lambda subject: tower_seconds(subject.tower, 64),
}


@contextlib.contextmanager
def open_subject(folder: Path, dtype: torch.dtype, **options: Any) -> Iterator[Subject]:
    info = read_model_info(folder)
    weights = open_weights(folder, dtype, CPU, options.get("quantization", "none"))
    encoder = tower_of(info).encoder(info.vision, weights)
    name = str(dtype).removeprefix("torch.")
    with open_runner(folder, CPU, name, 8, **options) as runner:
        # In blocks, as a worker computes.
        yield Subject(runner, TorchEngine(encoder, after_work=lambda: None))


def tower_seconds(tower: TorchEngine, side: int) -> float:
    """Of one picture of side · side patches."""
    info, grid = tower.encoder.preparation.info, GridTHW(1, side, side)
    pixels = torch.zeros(1, side * info.patch_size, side * info.patch_size, 3, dtype=torch.uint8)
    output = torch.empty(info.num_tokens(grid), info.embedding_width, dtype=tower.encoder.dtype)
    start = time.perf_counter()
    tower.encode([EncodeJob(pixels, grid, output)])
    return time.perf_counter() - start


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """As in an installation without a C++ compiler."""
    kernels = operators.kernels
    operators.kernels = None
    try:
        yield
    finally:
        operators.kernels = kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.3b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="all if not given")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--work", default="", help="only lines that begin so: decode, prefill, picture")
    options = parser.parse_args()
    works = {work: measure for work, measure in WORK.items() if work.startswith(options.work)}
    dtype = choose_dtype(options.dtype, CPU)
    name = str(dtype).removeprefix("torch.")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {name}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_checkpoint(folder, options.shape, num_layers=options.layers)
        with without_kernels():
            plain = stack.enter_context(open_subject(folder, dtype))
        subjects = {
            "with kernels": stack.enter_context(open_subject(folder, dtype)),
            "without": plain,
            "int8": stack.enter_context(open_subject(folder, dtype, quantization="int8")),
            "int4": stack.enter_context(open_subject(folder, dtype, quantization="int4")),
        }
        found: dict[tuple[str, str], list[float]] = {}
        for number in range(options.rounds + 1):
            for kind, subject in subjects.items():
                with without_kernels() if kind == "without" else contextlib.nullcontext():
                    for work, seconds in ((work, measure(subject)) for work, measure in works.items()):
                        if number:  # the first round warms up
                            found.setdefault((work, kind), []).append(seconds)
        info = read_model_info(folder).text
        nbytes = num_weights(info) * weight_size(folder, dtype) + CONTEXT * kv_bytes(info, dtype.itemsize)
    titles = [*subjects, "without / with", "with / int8", "with / int4"]
    print("\n| ms | " + " | ".join(titles) + " |\n" + "| --- " * (1 + len(titles)) + "|")
    medians = {key: 1e3 * statistics.median(times) for key, times in found.items()}
    for work in works:
        row = [medians[work, kind] for kind in subjects]
        print(f"| {work} | " + " | ".join(f"{ms:.1f}" for ms in (*row,)), end=" | ")
        print(f"{row[1] / row[0]:.2f} | {row[0] / row[2]:.2f} | {row[0] / row[3]:.2f} |")
    if (decode := medians.get(("decode, 1 request", "with kernels"))) is None:
        return
    rate = memory_rate()
    share = nbytes / decode * 1e3 / rate.bytes_per_s
    print(f"\ndecode, 1 request reads {nbytes / 1e6:.0f} MB at {share:.2f} of the memory's rate, "
          f"{rate.bytes_per_s / 1e9:.1f} GB/s ({rate.kernel})")  # fmt: skip


if __name__ == "__main__":
    main()
