"""What weights of fewer bits cost: error of the logits, memory at load, and the embedded model's exam.

    python -m tools.quantization_loss                         # the embedded model
    python -m tools.quantization_loss --model FOLDER          # any checkpoint, without the exam
    python -m tools.quantization_loss --count 20 --formats none int8 int4

Logits are those of a text's first tokens, beside float32. Each format is loaded in a process of its own, for
the memory that it takes. The exam's questions are those of `tools.tiny_model.evaluate`, through the server.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from tools.bench_engine import serve
from tools.tiny_model.evaluate import ask_server
from tools.tiny_model.exams import SKILLS, Exam, exams
from workers.llm.attention.base import SequencePart
from workers.llm.attention.torch import PagedAttention
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of
from workers.llm.models.registry import decoder_of
from workers.llm.parallel import TensorParallel
from workers.nn.loader import choose_dtype
from workers.nn.weights.registry import MADE_FORMATS, open_weights

CPU = torch.device("cpu")
MIB = 1 << 20


class Loaded(NamedTuple):
    logits: Tensor  # [num_tokens, vocab_size] float32
    weights: int  # bytes of memory that the decoder takes
    peak: int  # and at most while it is loaded, with the pages of its file


def logits_of(folder: Path, dtype: torch.dtype, quantization: str, token_ids: Tensor) -> Loaded:
    """Of the decoder alone."""
    before = _memory()
    info = read_model_info(folder)
    weights = open_weights(folder, dtype, CPU, quantization)
    decoder = decoder_of(info)(info.text, weights, TensorParallel())
    weights.close()
    after = _memory()
    weights_size, peak = after["RssAnon"] - before["RssAnon"], after["VmHWM"] - before["VmRSS"]
    num_tokens, num_blocks = len(token_ids), -(-len(token_ids) // 16)
    cache = PagedTensors(paged_of(decoder.cache_spec()), num_blocks, 16, dtype, CPU)
    step = PagedAttention(cache).plan([SequencePart(num_tokens, 0, tuple(range(num_blocks)))])
    hidden = decoder(decoder.embed(token_ids), torch.arange(num_tokens).expand(3, -1), step)
    return Loaded(decoder.logits(hidden).float(), weights_size, peak)


def _memory() -> dict[str, int]:
    """Of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = (words for words in lines if words[-1:] == ["kB"])
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


def in_process_of_its_own(
    folder: Path, dtype: torch.dtype, quantization: str, token_ids: Tensor, num_threads: int
) -> Loaded:
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), torch.set_num_threads, (num_threads,)
    ) as executor:
        return executor.submit(logits_of, folder, dtype, quantization, token_ids).result()


def print_logits(folder: Path, dtype: torch.dtype, formats: list[str], token_ids: Tensor) -> None:
    threads = torch.get_num_threads()
    exact = in_process_of_its_own(folder, torch.float32, "none", token_ids, threads).logits.double()
    likely, best = exact.log_softmax(dim=1), exact.argmax(dim=1)
    print(f"{len(token_ids)} tokens of text, beside float32; memory of the weights, MiB\n")
    print("| | error of the logits | another best token | KL, nats | weights | peak at load |")
    print("| --- " * 6 + "|")
    for name in formats:
        found = in_process_of_its_own(folder, dtype, name, token_ids, threads)
        logits = found.logits.double()
        error = float((logits - exact).norm() / exact.norm())
        others = float((logits.argmax(dim=1) != best).double().mean())
        kl = float((likely.exp() * (likely - logits.log_softmax(dim=1))).sum(dim=1).mean())
        size, peak = found.weights / MIB, found.peak / MIB
        print(f"| {_label(name, dtype)} | {error:.2%} | {others:.2%} | {kl:.5f} | {size:.0f} | {peak:.0f} |")


def print_exam(dtype: torch.dtype, formats: list[str], count: int) -> None:
    asked = exams(list(SKILLS), count)
    print(f"\n| exam, {len(asked)} questions | right | right there, wrong here | the reverse |")
    print("| --- " * 4 + "|")
    first: list[bool] = []
    for name in formats:
        right = right_answers(dtype, name, asked)
        first = first or right
        worse = sum(one and not other for one, other in zip(first, right, strict=True))
        better = sum(other and not one for one, other in zip(first, right, strict=True))
        print(f"| {_label(name, dtype)} | {sum(right) / len(right):.2%} | {worse} | {better} |", flush=True)


def right_answers(dtype: torch.dtype, quantization: str, asked: list[Exam]) -> list[bool]:
    options = ("--dtype", str(dtype).removeprefix("torch."), "--device", "cpu", "--quantization")
    with serve(EMBEDDED / "model", *options, quantization) as served:
        answers = asyncio.run(ask_server(served.url, asked))
    return [answer.text == exam.lesson.turns[-1].answer for exam, answer in zip(asked, answers, strict=True)]


def _label(quantization: str, dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if quantization == "none" else quantization


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint (default: the embedded one)")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--count", type=int, default=10, help="questions of each skill and split")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--formats", nargs="+", default=["none", *MADE_FORMATS])
    options = parser.parse_args()
    folder, dtype = options.model or EMBEDDED / "model", choose_dtype(options.dtype, CPU)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids = torch.tensor(tokenizer.encode(options.text.read_text()).ids[: options.tokens])
    print_logits(folder, dtype, options.formats, token_ids)
    if options.model is None and options.count:
        print_exam(dtype, options.formats, options.count)


if __name__ == "__main__":
    main()
