"""Attention of decode steps with keys and values in 8 bits, beside the model's type, on this CPU.

    python -m tools.bench_kv_cache
    python -m tools.bench_kv_cache --streams 1 --context 32768 --dtype bfloat16

One layer of a step, its write to the cache included, with the heads of published models. Layers lie behind
one another, so that none finds its keys in the processor's caches. Rounds are interleaved and medians
are told, since shared machines drift.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from workers.llm.attention.base import AttentionLayer, SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.kv_formats import FORMATS
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged
from workers.nn.loader import choose_dtype

CPU = torch.device("cpu")
BLOCK = 16  # tokens
CACHE_MIB = 128  # of each kind at least, so that there are enough layers
NAMES = ("auto", "int8", "fp8")


class Heads(NamedTuple):
    model: str
    num_heads: int
    num_kv_heads: int
    dim: int


SHAPES = (
    Heads("Qwen2-VL-2B", 12, 2, 128),
    Heads("Qwen3-VL-2B", 16, 8, 128),
    Heads("Qwen3.5-9B", 16, 4, 256),
)


def layers_of(
    heads: Heads, name: str, dtype: torch.dtype, streams: int, context: int
) -> list[Callable[[], object]]:
    """The work of a step in each layer."""
    kv_format, paged = FORMATS.get(name), Paged(heads.num_kv_heads, heads.dim)
    blocks = -(-context // BLOCK)
    nbytes = streams * context * paged.bytes_per_token(dtype, kv_format)
    num_layers = max(1, -(-(CACHE_MIB << 20) // nbytes))
    cache = PagedTensors([paged] * num_layers, streams * blocks, BLOCK, dtype, CPU, kv_format)
    for layer in range(num_layers):
        cache.zero(layer)
    tables = [tuple(range(first, first + blocks)) for first in range(0, streams * blocks, blocks)]
    attention = choose_backend("auto", CPU).attention(cache)
    step = attention.plan([SequencePart(1, context - 1, table) for table in tables])
    rotary = step.rotary(torch.zeros(streams, heads.dim // 2), dtype)
    qkv = torch.randn(streams, heads.num_heads + 2 * heads.num_kv_heads, heads.dim).to(dtype)

    def work(index: int) -> None:
        layer = AttentionLayer(
            index=index, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.dim
        )
        step.write(layer, qkv, rotary)
        step.attend(layer, qkv)

    return [functools.partial(work, index) for index in range(num_layers)]


def medians(heads: Heads, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a layer, by the option `--kv-cache-dtype`."""
    works = {name: layers_of(heads, name, dtype, options.streams, options.context) for name in NAMES}
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(options.rounds + 1):
        for name, layers in works.items():
            start = time.perf_counter()
            for layer in layers:
                layer()
            if number:  # the first round warms up
                found[name].append((time.perf_counter() - start) / len(layers))
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args()
    dtype = choose_dtype(options.dtype, CPU)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{options.streams} streams of {options.context} tokens in {str(dtype).removeprefix('torch.')}\n"
    )
    print("| a layer, ms | auto | int8 | fp8 | auto / int8 | auto / fp8 |\n" + "| --- " * 6 + "|")
    for heads in SHAPES:
        ms = medians(heads, dtype, options)
        shape = f"{heads.num_heads} / {heads.num_kv_heads} heads × {heads.dim}"
        times = " | ".join(f"{ms[name]:.1f}" for name in NAMES)
        ratios = f"{ms['auto'] / ms['int8']:.2f} | {ms['auto'] / ms['fp8']:.2f}"
        print(f"| {heads.model}: {shape} | {times} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
