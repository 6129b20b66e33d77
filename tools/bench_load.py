"""How long a checkpoint takes to load, beside how long its files take to read, and the memory that it takes
meanwhile.

    python -m tools.bench_load FOLDER                      # as the server's options have it by default
    python -m tools.bench_load FOLDER --dtype float32 --rounds 3

The files are dropped from the system's page cache before each reading and each loading: what is read then
comes from the disk, as far as a virtual machine's host has no cache of its own. The decoder and the tower are
loaded one by one, and both at once in two processes, as a server on a CPU does, and like its processes they
are forks of one that has imported torch. Memory is what a process takes more at its peak, pages of the files
included, over the size of the files; of both at once the sum of the peaks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.families import read_model_info
from workers.llm.models.registry import decoder_of
from workers.llm.parallel import TensorParallel
from workers.nn.loader import choose_dtype
from workers.nn.weights.registry import open_weights
from workers.vit.models.registry import tower_of

PIECE = 8 << 20  # bytes that are read at a time
DECODER, TOWER = "decoder", "tower"
CPU = torch.device("cpu")


class Loaded(NamedTuple):
    seconds: float
    peak: float  # bytes


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(files: Sequence[Path]) -> None:
    """From the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: Sequence[Path]) -> float:
    forget(files)
    piece, start = bytearray(PIECE), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return time.perf_counter() - start


def load(folder: Path, parts: Sequence[str], dtype: torch.dtype) -> Loaded:
    """Each part in a process of its own, all at once. This process must have computed nothing: a fork has
    none of its threads."""
    context = multiprocessing.get_context("fork")
    ends, workers = [], []
    for part in parts:
        here, there = context.Pipe()
        workers.append(context.Process(target=_load, args=(there, folder, part, dtype)))
        workers[-1].start()
        there.close()
        ends.append(here)
    for end in ends:
        end.recv()
    forget(files_of(folder))
    start = time.perf_counter()
    for end in ends:
        end.send(None)
    peaks = [float(end.recv()) for end in ends]
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return Loaded(seconds, sum(peaks))


def _load(end: Connection[Any, Any], folder: Path, part: str, dtype: torch.dtype) -> None:
    """Says when it is ready, begins when it is told to, and answers with the bytes of its peak."""
    before = _memory("VmRSS")
    end.send(None)
    end.recv()
    info = read_model_info(folder)
    weights = open_weights(folder, dtype, CPU)
    if part == DECODER:
        made: object = decoder_of(info)(info.text, weights, TensorParallel())
    else:
        made = tower_of(info).encoder(info.vision, weights)
    weights.close()
    end.send(_memory("VmHWM") - before)
    del made


def _memory(name: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=1, help="of which medians are told")
    options = parser.parse_args(arguments)
    files = files_of(options.folder)
    if not files:
        parser.error(f"{str(options.folder)!r} has no safetensors files")
    size, dtype = sum(path.stat().st_size for path in files), choose_dtype(options.dtype, CPU)
    ways: dict[str, tuple[str, ...]] = {DECODER: (DECODER,), TOWER: (TOWER,), "both": (DECODER, TOWER)}
    read: list[float] = []
    loaded: dict[str, list[Loaded]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        read.append(read_seconds(files))
        for name, parts in ways.items():
            loaded[name].append(load(options.folder, parts, dtype))
    of_files = statistics.median(read)
    print(
        f"{options.folder.name}, {size / 1e9:.2f} GB, {str(dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads; files read in {of_files:.2f} s, {size / of_files / 1e9:.2f} GB/s"
    )
    print("\n| | s | of reading the files | peak memory, of their size |\n| --- | --- | --- | --- |")
    for name, found in loaded.items():
        seconds, peak = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"| {name} | {seconds:.2f} | {seconds / of_files:.2f} | {peak / size:.2f} |")


if __name__ == "__main__":
    main()
