"""Decode steps of a decoder with experts on the CPU: bytes of the chosen experts beside the memory's rate.

    python -m tools.bench_experts                      # 64 experts of which 4; 1 and 8 requests
    python -m tools.bench_experts --quantization int8

Weights are random, in 16 bits as published ones are; no file is read. The memory's rate is that of the
product of a large matrix and a vector, measured in turn with the steps. `experts`: the MLPs alone, their
routers included. `step`: the decoder without its output layer, beside all the bytes that a step reads. Both
are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pipeline.families.qwen3_vl import ExpertsInfo, Qwen3TextInfo
from workers.llm.attention.base import SequencePart
from workers.llm.attention.torch import PagedAttention
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of
from workers.llm.models.experts import ExpertsMlp
from workers.llm.models.qwen3 import Qwen3Decoder
from workers.llm.models.stream import PlainStream
from workers.llm.parallel import TensorParallel
from workers.nn.layers import RMSNorm
from workers.nn.loader import Checkpoint, choose_dtype
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.dense import Dense, HalfLinear
from workers.nn.weights.experts import ListedExperts
from workers.nn.weights.int8 import Int8, Int8Linear, PanelLinear
from workers.nn.weights.weights import Weights

CPU = torch.device("cpu")
HISTORY, BLOCK = 32, 16
MATRIX_BYTES = 1 << 28  # more than caches hold, and read in about the time of a step
SPREAD = 0.02  # of the weights
FORMATS: dict[str, Callable[[], Format]] = {"none": Dense, "int8": Int8}


class RandomCheckpoint:
    """Tensors by shape; each part that is asked for is drawn anew."""

    device = CPU

    def __init__(self, info: Qwen3TextInfo, dtype: torch.dtype) -> None:
        self.dtype = dtype
        hidden, dim = info.hidden_size, info.head_dim
        experts = info.experts
        assert experts is not None
        count, size = experts.num_experts, experts.intermediate_size
        self._shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (info.vocab_size, hidden),
            "q_proj.weight": (info.num_heads * dim, hidden),
            "k_proj.weight": (info.num_kv_heads * dim, hidden),
            "v_proj.weight": (info.num_kv_heads * dim, hidden),
            "o_proj.weight": (hidden, info.num_heads * dim),
            "q_norm.weight": (dim,),
            "k_norm.weight": (dim,),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "norm.weight": (hidden,),
            "gate.weight": (count, hidden),
            "experts.gate_up_proj": (count, hidden, 2 * size),
            "experts.down_proj": (count, size, hidden),
        }

    def has_module(self, module: str) -> bool:
        return False

    def shape(self, name: str) -> tuple[int, ...]:
        parts = name.split(".")
        known = (self._shapes.get(".".join(parts[-count:])) for count in (2, 1))
        return next(shape for shape in known if shape is not None)

    def rows(self, name: str) -> Tensor:
        return self.load(name)

    def load(
        self, name: str, rows: slice = slice(None), columns: slice | None = None, at: int | None = None
    ) -> Tensor:
        whole = torch.empty(self.shape(name)[0 if at is None else 1 :], device="meta")
        part = whole[rows] if columns is None else whole[rows, columns]
        drawn = torch.randn(part.shape).mul_(SPREAD)
        return (drawn + 1 if "norm" in name else drawn).bfloat16().to(self.dtype)


class WatchedExperts(Experts):
    """Keeps what was chosen."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self.chosen: list[Tensor] = []

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        self.chosen.append(chosen)
        return self._experts(x, chosen, shares)


class Sizes(NamedTuple):
    expert: int  # bytes of one
    rest: int  # of a layer's other weights


class Bench:
    def __init__(self, info: Qwen3TextInfo, dtype: torch.dtype, format: Format) -> None:
        checkpoint = cast(Checkpoint, RandomCheckpoint(info, dtype))
        self.info, self.dtype = info, dtype
        self.decoder = Qwen3Decoder(info, Weights(checkpoint, [format]), TensorParallel())
        self._mlps = [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, ExpertsMlp)]
        layer, experts = self.decoder.layers[0], self._mlps[0].experts
        assert isinstance(experts, ListedExperts)
        router = info.hidden_size * len(experts.layers) * dtype.itemsize
        rest = nbytes(layer.qkv, dtype) + nbytes(layer.o_proj, dtype) + router
        self.sizes = Sizes(sum(nbytes(linear, dtype) for linear in experts.layers[0]), rest)
        self.kind = type(experts.layers[0][0]).__name__
        self._watched = [WatchedExperts(mlp.experts) for mlp in self._mlps]
        for mlp, watched in zip(self._mlps, self._watched, strict=True):
            mlp.experts = watched
        self._norm = RMSNorm(torch.ones(info.hidden_size, dtype=dtype), info.rms_norm_eps)

    def experts(self, num_requests: int) -> tuple[float, float]:
        """Seconds of all layers' MLPs, and the bytes of the experts that they read."""
        inputs = [self._draw(num_requests) for _ in self._mlps]
        start = time.perf_counter()
        for mlp, x in zip(self._mlps, inputs, strict=True):
            mlp(PlainStream(x, TensorParallel()), self._norm)
        return time.perf_counter() - start, self._bytes_read()

    def step(self, num_requests: int) -> tuple[float, float]:
        """Seconds of a decode step, and the bytes of all the weights that it read."""
        blocks = HISTORY // BLOCK + 1
        spec = paged_of(self.decoder.cache_spec())
        cache = PagedTensors(spec, num_requests * blocks, BLOCK, self.dtype, CPU)
        for tensor in cache.tensors:
            tensor.zero_()
        attention = PagedAttention(cache)
        x, positions = self._draw(num_requests), torch.full((3, num_requests), HISTORY)
        start = time.perf_counter()
        parts = [SequencePart(1, HISTORY, range(n * blocks, (n + 1) * blocks)) for n in range(num_requests)]
        self.decoder(x, positions, attention.plan(parts))
        seconds = time.perf_counter() - start
        return seconds, self._bytes_read() + self.info.num_layers * self.sizes.rest

    def _draw(self, num_requests: int) -> Tensor:
        return torch.randn(num_requests, self.info.hidden_size).to(self.dtype)

    def _bytes_read(self) -> float:
        """Of experts, since this was last asked."""
        count = sum(len(chosen.unique()) for watched in self._watched for chosen in watched.chosen)
        for watched in self._watched:
            watched.chosen.clear()
        return count * self.sizes.expert


def nbytes(linear: Linear, dtype: torch.dtype) -> int:
    """Of the weight, as it is in memory."""
    size = (
        1
        if isinstance(linear, Int8Linear | PanelLinear)
        else 2
        if isinstance(linear, HalfLinear)
        else dtype.itemsize
    )
    return linear.in_features * linear.out_features * size


def memory_seconds(matrix: Tensor, vector: Tensor) -> float:
    start = time.perf_counter()
    torch.mv(matrix, vector)
    return time.perf_counter() - start


def make_info(options: argparse.Namespace) -> Qwen3TextInfo:
    return Qwen3TextInfo(
        hidden_size=options.hidden, intermediate_size=options.hidden, num_layers=options.layers,
        num_heads=options.hidden // 64, num_kv_heads=4, head_dim=128, vocab_size=1024, rms_norm_eps=1e-6,
        rope_theta=5e6, mrope_section=(24, 20, 20), max_position_embeddings=4096, tie_word_embeddings=True,
        num_features=0,
        experts=ExpertsInfo(
            num_experts=options.experts, num_chosen=options.chosen, intermediate_size=options.intermediate,
            layers=tuple(range(options.layers)),
        ),
    )  # fmt: skip


def measure(bench: Bench, num_requests: int, num_rounds: int) -> Sequence[str]:
    """A line for the experts and one for whole steps."""
    rows = MATRIX_BYTES // bench.dtype.itemsize // 8192
    matrix, vector = torch.ones(rows, 8192, dtype=bench.dtype), torch.ones(8192, dtype=bench.dtype)
    runs = {"experts": bench.experts, "step": bench.step}
    rates: dict[str, list[float]] = {"memory": [], **{name: [] for name in runs}}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(num_rounds + 2):
        found = {"memory": matrix.nbytes / memory_seconds(matrix, vector)}
        for name, run in runs.items():
            seconds, size = run(num_requests)
            found[name] = size / seconds
            times[name].append(seconds)
        if number >= 2:  # warm
            for name, rate in found.items():
                rates[name].append(rate)
    memory = statistics.median(rates["memory"])
    lines = []
    for name in runs:
        rate, seconds = statistics.median(rates[name]), statistics.median(times[name][2:])
        row = num_requests, name, 1000 * seconds, rate / 1e9, memory / 1e9, rate / memory
        lines.append("{:8d}   {:8} {:7.2f} {:7.1f} {:7.1f}   {:.2f}".format(*row))
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768, help="size of each expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=4, help="experts of each token")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", choices=tuple(FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = choose_dtype(options.dtype, CPU)
    bench = Bench(make_info(options), dtype, FORMATS[options.quantization]())
    print(f"{dtype}, experts as {bench.kind}, {bench.sizes.expert / 1e6:.1f} MB each")
    print("requests   what          ms    GB/s  memory   share")
    for num_requests in options.requests:
        print(*measure(bench, num_requests, options.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
