"""Attention of many rows on this CPU: the compiled kernels beside torch's fused attention.

    python -m tools.bench_attention
    python -m tools.bench_attention --kernel avx512_bf16

Prompts (causal, keys and values in blocks of the cache) and the segments of towers, in bfloat16. Rounds are
interleaved and medians are told, since shared machines drift. Operations are those of the numbers that a
query sees: half of all for a prompt.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from workers.nn.native import operators, row_attention

BLOCK = 16  # tokens


class RowShape(NamedTuple):
    segments: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    history: int = 0  # tokens before a prompt's rows

    @property
    def flop(self) -> float:
        seen = self.history + (self.rows + 1) / 2 if self.is_causal else self.rows
        return 4.0 * self.segments * self.rows * seen * self.heads * self.head_dim

    def __str__(self) -> str:
        if self.is_causal:
            behind = f" behind {self.history}" if self.history else ""
            return f"prompt of {self.rows}{behind}, {self.heads} / {self.kv_heads} heads × {self.head_dim}"
        return f"{self.segments} × {self.rows} patches, {self.heads} heads × {self.head_dim}"


PROMPTS = [
    RowShape(1, rows, *heads, True, history)
    for heads in ((14, 2, 64), (12, 2, 128), (16, 8, 128))
    for rows, history in ((64, 0), (512, 0), (2048, 0), (8192, 0), (24, 4096), (512, 4096))
]
TOWERS = [RowShape(1, rows, 16, 16, dim, False) for rows in (1024, 4096) for dim in (64, 72, 80)]
WINDOWS = [RowShape(segments, 64, 16, 16, 80, False) for segments in (1, 16, 64)]


def works(shape: RowShape) -> tuple[Callable[[], object], Callable[[], object]]:
    """torch's attention and the kernel's, as a worker calls them."""
    num_rows, dim = shape.segments * shape.rows, shape.head_dim
    q = torch.randn(num_rows, shape.heads, dim).bfloat16()
    if shape.is_causal:
        length = shape.history + num_rows
        cache = torch.randn(-(-length // BLOCK) * BLOCK, 2 * shape.kv_heads, dim).bfloat16()
        keys, values = cache[:length].split(shape.kv_heads, dim=1)
        blocks = row_attention.KeyBlocks(torch.arange(-(-length // BLOCK), dtype=torch.int32), BLOCK)
        segments = row_attention.RowSegments.of([row_attention.RowSegment(0, 0, num_rows, length)])

        def ours() -> None:
            out = torch.empty_like(q)
            row_attention.attend(q, keys, values, out, segments, dim**-0.5, blocks=blocks, is_causal=True)

        mask = torch.ones(num_rows, length, dtype=torch.bool).tril(shape.history) if shape.history else None
        heads, k, v = (x.transpose(0, 1)[None] for x in (q, keys, values))
        return (
            lambda: F.scaled_dot_product_attention(
                heads, k, v, mask, is_causal=mask is None, enable_gqa=True
            ),
            ours,
        )
    run = shape.segments, shape.rows
    all_rows = (q, *torch.randn(2, *q.shape).bfloat16().unbind())
    heads, k, v = (x.unflatten(0, run).transpose(1, 2) for x in all_rows)
    out = torch.empty_like(heads)
    return (
        lambda: F.scaled_dot_product_attention(heads, k, v),
        lambda: row_attention.attend_within(heads, k, v, out),
    )


def rates(shape: RowShape, seconds: float) -> list[float]:
    """GFLOP/s of torch and of the kernel, medians of rounds."""
    both = works(shape)
    found: list[list[float]] = [[], []]
    stop = time.perf_counter() + seconds
    while len(found[0]) < 4 or time.perf_counter() < stop:
        for times, work in zip(found, both, strict=True):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return [shape.flop / statistics.median(times[1:]) / 1e9 for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    versions = operators.kernels.rows_versions() if operators.kernels else []
    parser.add_argument("--kernel", choices=versions, help="the best one if not given")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    options = parser.parse_args()
    if not versions:
        parser.error("there is no kernel for this processor")
    kernel = options.kernel or versions[0]
    operators.kernels.use_rows(kernel)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernel}\n")
    print("| GFLOP/s | torch | kernel | kernel / torch |\n" + "| --- " * 4 + "|")
    for shape in [*PROMPTS, *TOWERS, *WINDOWS]:
        torchs, ours = rates(shape, options.seconds)
        print(f"| {shape} | {torchs:.0f} | {ours:.0f} | {ours / torchs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
