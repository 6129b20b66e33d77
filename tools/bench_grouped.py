"""The linear layers of one decoder layer on this CPU, by how many bits a weight has and what computes them.

    python -m tools.bench_grouped                        # as a decoder of 2 B parameters has them
    python -m tools.bench_grouped --shape 0.3b --rows 1 2 --group 32

Dense weights and those that `--quantization int4` makes at load, beside weights of quantised checkpoints
(`workers/nn/weights/grouped.py`): by the kernels that read them as they are, with x in the model's type or in
8 bits, and widened for a dense product. Numbers are random: speed does not depend on them. Several copies of
the layer take turns, so that no cache holds a weight. Rounds are interleaved and medians are told, since
shared machines drift.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tools.memory_rate import memory_rate
from tools.random_checkpoint import SHAPES
from workers.nn.loader import choose_dtype
from workers.nn.native.grouped_rows import TILES, grouped_versions, multiply
from workers.nn.native.int4 import GROUP
from workers.nn.native.quantized_panels import BLOCK, OUTPUTS, make_panels
from workers.nn.weights.base import Activations
from workers.nn.weights.dense import make_linear
from workers.nn.weights.grouped import CHUNK, GroupedWeight, NumberKind
from workers.nn.weights.grouped_cpu import CpuProduct
from workers.nn.weights.int8 import PanelLinear

COPIES = 3
MANY = 64  # rows, from which weights are no longer what takes the time: one copy is enough
Multiply = Callable[[Tensor], object]


class Matrix(NamedTuple):
    out_features: int
    in_features: int


class Subject(NamedTuple):
    """One way to compute."""

    layers: Sequence[Sequence[Multiply]]  # of each copy the matrices
    least: int = 1  # rows
    bits: float = 0  # of a weight; 0: not told


def matrices_of(shape: str) -> list[Matrix]:
    text, head_dim = SHAPES[shape].text, SHAPES[shape].head_dim
    hidden, intermediate = text["hidden_size"], text["intermediate_size"]
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    return [
        Matrix(queries + 2 * keys, hidden), Matrix(hidden, queries), Matrix(2 * intermediate, hidden),
        Matrix(hidden, intermediate),
    ]  # fmt: skip


def random_weight(kind: NumberKind, matrix: Matrix, group: int) -> GroupedWeight:
    out, size = matrix
    shape, padded = (out, -(-size // group)), -(-size // CHUNK) * CHUNK
    numbers = torch.randint(
        0, 256, (out, padded // 2 if kind is NumberKind.INT4 else padded), dtype=torch.uint8
    )
    zeros = None
    if kind is NumberKind.INT4:
        zeros = torch.randint(0, 16, shape, dtype=torch.uint8)
    elif kind is NumberKind.INT8:
        numbers = numbers.view(torch.int8)
    else:
        numbers = (numbers & 0xBF).view(torch.float8_e4m3fn)  # below 2, so that nothing overflows
    return GroupedWeight(kind, numbers, torch.rand(shape) / 100, zeros, group, size, size, None)


def dense_subject(matrices: Sequence[Matrix]) -> Subject:
    dtype = choose_dtype("auto", torch.device("cpu"))
    # Exact in float16, as trained weights are.
    layers = [
        [make_linear(torch.randn(matrix).half().to(dtype)) for matrix in matrices] for _ in range(COPIES)
    ]
    return Subject(layers, bits=16)


def at_load_subject(matrices: Sequence[Matrix]) -> Subject:
    """What `--quantization int4` makes."""

    def make(matrix: Matrix) -> Multiply:
        out, size = matrix
        groups, panels = -(-size // BLOCK) * BLOCK // GROUP, -(-out // OUTPUTS)
        numbers = torch.randint(0, 256, (panels, groups, OUTPUTS * (1 + GROUP // 2)), dtype=torch.uint8)
        return PanelLinear(
            make_panels(numbers, size, 4, torch.zeros(out, dtype=torch.int32), torch.rand(out))
        )

    return Subject([[make(matrix) for matrix in matrices] for _ in range(COPIES)], bits=4.25)


def grouped_subjects(kind: NumberKind, matrices: Sequence[Matrix], group: int) -> dict[str, Subject]:
    weights = [[random_weight(kind, matrix, group) for matrix in matrices] for _ in range(COPIES)]
    of_weight = weights[0][0]
    parts = (of_weight.numbers, of_weight.scales, of_weight.zeros)
    num_bytes = sum(part.numel() * part.itemsize for part in parts if part is not None)
    bits = 8 * num_bytes / (matrices[0].out_features * matrices[0].in_features)
    *_, kernel = (name for name in grouped_versions() if name != TILES)

    def by_kernel(is_quantized: bool, name: str = kernel) -> Callable[[GroupedWeight], Multiply]:
        return lambda weight: lambda x: multiply(name, weight, x, None, None, is_quantized)

    def widened(weight: GroupedWeight) -> Multiply:
        return CpuProduct(weight, Activations.NONE).multiply_dense

    ways: dict[str, tuple[Callable[[GroupedWeight], Multiply], int]] = {f"{kind}": (by_kernel(False), 1)}
    if kind is not NumberKind.FP8:
        ways[f"{kind}, x in 8 bits"] = by_kernel(True), 1
    if TILES in grouped_versions():
        ways[f"{kind}, tiles"] = by_kernel(False, TILES), 1
    ways[f"{kind}, widened"] = widened, 4
    return {
        name: Subject([[make(weight) for weight in layer] for layer in weights], least, bits)
        for name, (make, least) in ways.items()
    }


def seconds(subject: Subject, matrices: Sequence[Matrix], rows: int) -> float:
    """Of one layer."""
    dtype = choose_dtype("auto", torch.device("cpu"))
    inputs = {matrix.in_features: torch.randn(rows, matrix.in_features).to(dtype) for matrix in matrices}
    layers = subject.layers[:1] if rows >= MANY else subject.layers
    start = time.perf_counter()
    for layer in layers:
        for matrix, compute in zip(matrices, layer, strict=True):
            compute(inputs[matrix.in_features])
    return (time.perf_counter() - start) / len(layers)


def measure(
    subjects: Mapping[str, Subject], matrices: Sequence[Matrix], all_rows: Sequence[int], rounds: int
) -> dict[tuple[str, int], float]:
    """Seconds of one layer, by subject and rows."""
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            for rows in all_rows:
                if rows < subject.least:
                    continue
                taken = seconds(subject, matrices, rows)
                if number:  # the first round warms up
                    times.setdefault((name, rows), []).append(taken)
    return {key: statistics.median(taken) for key, taken in times.items()}


def print_table(
    subjects: Mapping[str, Subject], found: Mapping[tuple[str, int], float], num_weights: int
) -> None:
    all_rows = sorted({rows for _, rows in found})
    titles = [f"{rows} row{'s' if rows > 1 else ''}" for rows in all_rows]
    print("\nms of a layer, and how many times as long dense weights take\n")
    print(f"| | bits of a weight | {' | '.join(titles)} |\n" + "| --- " * (2 + len(titles)) + "|")
    for name, subject in subjects.items():
        cells = [
            f"{1e3 * found[name, rows]:.2f} ({found['dense', rows] / found[name, rows]:.2f})"
            if (name, rows) in found
            else ""
            for rows in all_rows
        ]
        print(f"| {name} | {subject.bits:.2f} | {' | '.join(cells)} |")
    rate = memory_rate().bytes_per_s
    print(f"\nshare of the memory's rate, {rate / 1e9:.1f} GB/s, at {all_rows[0]} rows:")
    for name, subject in subjects.items():
        if (name, all_rows[0]) in found:
            read = num_weights * subject.bits / 8 / found[name, all_rows[0]]
            print(f"  {name}: {read / rate:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2b", choices=sorted(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 4, 16, 64, 512))
    parser.add_argument("--group", type=int, default=128, help="inputs with one scale")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not grouped_versions():
        parser.error("there are no kernels for this processor")
    dtype = choose_dtype("auto", torch.device("cpu"))
    name = str(dtype).removeprefix("torch.")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {name}, "
          f"kernels for {grouped_versions()[-1]}")  # fmt: skip
    matrices = matrices_of(options.shape)
    subjects = {
        "dense": dense_subject(matrices),
        "int4 at load": at_load_subject(matrices),
    }
    for kind in NumberKind:
        subjects |= grouped_subjects(kind, matrices, options.group)
    found = measure(subjects, matrices, options.rows, options.rounds)
    print_table(subjects, found, sum(matrix.out_features * matrix.in_features for matrix in matrices))


if __name__ == "__main__":
    main()
