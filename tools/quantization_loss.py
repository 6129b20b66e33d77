"""What weights of fewer bits cost, or keys and values: errors of logits and of pictures' features, memory at
load, and the embedded model's exam.

    python -m tools.quantization_loss                         # the embedded model
    python -m tools.quantization_loss --kv-cache-dtype auto int8 fp8
    python -m tools.quantization_loss --model FOLDER          # any checkpoint, without the exam
    python -m tools.quantization_loss --count 20 --formats none int8 int4

Logits are those of a text's first tokens, features the tower's of pictures in a folder, both beside float32.
Each format is loaded in a process of its own, for the memory that it takes. The exam's questions are those of
`tools.tiny_model.evaluate`, through the server: for each format with decoder and tower in it, and with the
decoder alone. With `--kv-cache-dtype` weights are as the checkpoint has them, and only the decoder is asked:
logits beside those with keys and values in the model's type, where each token attends to what the cache has.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.wire.base import GridTHW
from tools.bench_engine import serve
from tools.tiny_model.evaluate import ask_server
from tools.tiny_model.exams import SKILLS, Exam, exams
from workers.llm.attention.base import SequencePart
from workers.llm.attention.torch import PagedAttention
from workers.llm.cache.kv_formats import FORMATS
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of
from workers.llm.models.registry import decoder_of
from workers.llm.parallel import TensorParallel
from workers.nn.loader import choose_dtype
from workers.nn.weights.registry import MADE_FORMATS, open_weights
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.registry import tower_of

CPU = torch.device("cpu")
MIB = 1 << 20
SIDE = 448  # of pictures, in pixels


class Loaded(NamedTuple):
    found: Tensor  # logits [num_tokens, vocab_size], or features [num_tokens, embedding_width], in float32
    weights: int  # bytes of memory that the decoder or the tower takes
    peak: int  # and at most while it is loaded, with the pages of its file


class KvLoss(NamedTuple):
    """Of a text, beside keys and values in the model's type."""

    error: float  # relative, of the logits
    others: float  # share of tokens behind which another one is the likeliest
    kl: float  # nats, the mean of all tokens


Compute = Callable[[Path, torch.dtype, str, Any], Loaded]


def logits_of(
    folder: Path, dtype: torch.dtype, quantization: str, token_ids: Tensor, kv_cache_dtype: str = "auto"
) -> Loaded:
    """Of the decoder alone."""
    before = _memory()
    info = read_model_info(folder)
    weights = open_weights(folder, dtype, CPU, quantization)
    decoder = decoder_of(info)(info.text, weights, TensorParallel())
    weights.close()
    weights_size, peak = _since(before)
    num_tokens, num_blocks = len(token_ids), -(-len(token_ids) // 16)
    kv_format, spec = FORMATS.get(kv_cache_dtype), paged_of(decoder.cache_spec())
    cache = PagedTensors(spec, num_blocks, 16, dtype, CPU, kv_format)
    step = PagedAttention(cache).plan([SequencePart(num_tokens, 0, tuple(range(num_blocks)))])
    hidden = decoder(decoder.embed(token_ids), torch.arange(num_tokens).expand(3, -1), step)
    return Loaded(decoder.logits(hidden).float(), weights_size, peak)


def features_of(
    folder: Path, dtype: torch.dtype, quantization: str, pictures: Sequence[npt.NDArray[np.uint8]]
) -> Loaded:
    """Of the tower alone. `pictures`: [height, width, 3], of whole tokens."""
    before = _memory()
    info = read_model_info(folder)
    weights = open_weights(folder, dtype, CPU, quantization)
    encoder = tower_of(info).encoder(info.vision, weights)
    weights.close()
    weights_size, peak = _since(before)
    jobs: list[EncodeJob] = []
    for picture in pictures:
        grid = GridTHW(1, *(side // info.vision.patch_size for side in picture.shape[:2]))
        shape = info.vision.num_tokens(grid), info.vision.embedding_width
        jobs.append(EncodeJob(torch.from_numpy(picture)[None], grid, torch.empty(shape, dtype=dtype)))
    TorchEngine(encoder).encode(jobs)
    return Loaded(torch.cat([job.output for job in jobs]).float(), weights_size, peak)


def read_pictures(folder: Path, factor: int) -> list[npt.NDArray[np.uint8]]:
    """Of `SIDE` pixels, or a little less: sides are multiples of `factor`."""
    side = SIDE // factor * factor
    files = sorted(folder.glob("*.png")) + sorted(folder.glob("*.jpg"))
    return [np.array(Image.open(file).convert("RGB").resize((side, side))) for file in files]


def _since(before: dict[str, int]) -> tuple[int, int]:
    """The bytes that have been taken since, and the most of them."""
    after = _memory()
    return after["RssAnon"] - before["RssAnon"], after["VmHWM"] - before["VmRSS"]


def _memory() -> dict[str, int]:
    """Of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = (words for words in lines if words[-1:] == ["kB"])
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


def in_process_of_its_own(
    compute: Compute, folder: Path, dtype: torch.dtype, quantization: str, given: object
) -> Loaded:
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    ) as executor:
        return executor.submit(compute, folder, dtype, quantization, given).result()


def print_logits(folder: Path, dtype: torch.dtype, formats: list[str], token_ids: Tensor) -> None:
    exact = in_process_of_its_own(logits_of, folder, torch.float32, "none", token_ids).found.double()
    likely, best = exact.log_softmax(dim=1), exact.argmax(dim=1)
    print(f"{len(token_ids)} tokens of text, beside float32; memory of the weights, MiB\n")
    print("| | error of the logits | another best token | KL, nats | weights | peak at load |")
    print("| --- " * 6 + "|")
    for name in formats:
        loaded = in_process_of_its_own(logits_of, folder, dtype, name, token_ids)
        logits = loaded.found.double()
        error = float((logits - exact).norm() / exact.norm())
        others = float((logits.argmax(dim=1) != best).double().mean())
        kl = float((likely.exp() * (likely - logits.log_softmax(dim=1))).sum(dim=1).mean())
        size, peak = loaded.weights / MIB, loaded.peak / MIB
        print(f"| {_label(name, dtype)} | {error:.2%} | {others:.2%} | {kl:.5f} | {size:.0f} | {peak:.0f} |")


def print_features(
    folder: Path, dtype: torch.dtype, formats: list[str], pictures: list[npt.NDArray[np.uint8]]
) -> None:
    exact = in_process_of_its_own(features_of, folder, torch.float32, "none", pictures).found.double()
    print(f"\n{len(pictures)} pictures, {len(exact)} tokens, beside float32; memory of the weights, MiB\n")
    print("| | error of the features | of a token, median | the worst | weights | peak at load |")
    print("| --- " * 6 + "|")
    for name in formats:
        loaded = in_process_of_its_own(features_of, folder, dtype, name, pictures)
        difference = loaded.found.double() - exact
        error = float(difference.norm() / exact.norm())
        of_tokens = difference.norm(dim=1) / exact.norm(dim=1)
        errors = f"{error:.2%} | {float(of_tokens.median()):.2%} | {float(of_tokens.max()):.2%}"
        print(f"| {_label(name, dtype)} | {errors} | {loaded.weights / MIB:.0f} | {loaded.peak / MIB:.0f} |")


def kv_loss(logits: Tensor, exact: Tensor) -> KvLoss:
    """Of logits [num_tokens, vocab_size]."""
    likely, other = (one.double().log_softmax(dim=1) for one in (exact, logits))
    return KvLoss(
        float((logits.double() - exact.double()).norm() / exact.double().norm()),
        float((likely.argmax(dim=1) != other.argmax(dim=1)).double().mean()),
        float((likely.exp() * (likely - other)).sum(dim=1).mean()),
    )


def print_kv_loss(folder: Path, dtype: torch.dtype, names: list[str], token_ids: Tensor) -> None:
    exact = logits_of(folder, dtype, "none", token_ids).found
    print(f"{len(token_ids)} tokens of text, beside keys and values in {_label('none', dtype)}\n")
    print("| keys and values | error of the logits | another best token | KL, nats |")
    print("| --- " * 4 + "|")
    for name in names:
        loss = kv_loss(logits_of(folder, dtype, "none", token_ids, name).found, exact)
        label = _label("none" if name == "auto" else name, dtype)
        print(f"| {label} | {loss.error:.2%} | {loss.others:.2%} | {loss.kl:.6f} |")


def print_exam(dtype: torch.dtype, subjects: Mapping[str, Sequence[str]], count: int) -> None:
    """Of servers with these options, by their names; the first one is what the others stand beside."""
    asked = exams(list(SKILLS), count)
    print(f"\n| exam, {len(asked)} questions | right | right there, wrong here | the reverse |")
    print("| --- " * 4 + "|")
    first: list[bool] = []
    for label, options in subjects.items():
        right = right_answers(dtype, options, asked)
        first = first or right
        worse = sum(one and not other for one, other in zip(first, right, strict=True))
        better = sum(other and not one for one, other in zip(first, right, strict=True))
        print(f"| {label} | {sum(right) / len(right):.2%} | {worse} | {better} |", flush=True)


def weight_subjects(dtype: torch.dtype, formats: list[str]) -> dict[str, Sequence[str]]:
    """Each format for decoder and tower, and for the decoder alone."""
    subjects: dict[str, Sequence[str]] = {}
    for name in formats:
        for tower in dict.fromkeys((name, "none")):
            label = _label(name, dtype) + ("" if tower == name else f", tower in {_label(tower, dtype)}")
            subjects[label] = "--quantization", name, "--vit-quantization", tower
    return subjects


def right_answers(dtype: torch.dtype, formats: Sequence[str], asked: list[Exam]) -> list[bool]:
    options = "--dtype", str(dtype).removeprefix("torch."), "--device", "cpu"
    with serve(EMBEDDED / "model", *options, *formats) as served:
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
    parser.add_argument("--pictures", type=Path, default=EMBEDDED / "samples", help="folder of png and jpg")
    parser.add_argument("--count", type=int, default=10, help="questions of each skill and split")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--formats", nargs="+", default=["none", *MADE_FORMATS])
    parser.add_argument("--kv-cache-dtype", nargs="+", choices=("auto", *FORMATS), help="of these instead")
    options = parser.parse_args()
    folder, dtype = options.model or EMBEDDED / "model", choose_dtype(options.dtype, CPU)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids = torch.tensor(tokenizer.encode(options.text.read_text()).ids[: options.tokens])
    has_exam = options.model is None and options.count
    if options.kv_cache_dtype:
        print_kv_loss(folder, dtype, options.kv_cache_dtype, token_ids)
        if has_exam:
            asked = {name: ("--kv-cache-dtype", name) for name in options.kv_cache_dtype}
            print_exam(dtype, asked, options.count)
        return
    print_logits(folder, dtype, options.formats, token_ids)
    factor = read_model_info(folder).vision.factor
    print_features(folder, dtype, options.formats, read_pictures(options.pictures, factor))
    if has_exam:
        print_exam(dtype, weight_subjects(dtype, options.formats), options.count)


if __name__ == "__main__":
    main()
