"""What images cost, and whom: each figure beside its own reference, in one run.

    python -m tools.bench_vision                              # 0.31 B parameters, everything
    python -m tools.bench_vision --parts isolation --rounds 5

Needs transformers (`pip install -e '.[test]'`). Weights are random. Servers are its own. Rounds are
interleaved and medians are told, since shared machines drift.

isolation   ITL of four streams while images arrive without pause, beside the same streams alone:
            each `--cpu-sharing`
loop        the same of an in-process loop of the same code that encodes between its steps, as servers without
            a process for the ViT do
ttft        of a request with four images: two ViTs beside one
gate        TTFT of a request with four images, of which what is there is prefilled while later ones encode,
            beside waiting for all of them
repeat      TTFT of an image seen before, with another text, beside the first time: before the text, and
            behind it, where no prefix is shared
forward     patches/s of the encoder beside Hugging Face's tower and the rate of matrix products
together    eight requests at once, each with an image of its own, beside Hugging Face one after the other
decode      a 12-megapixel JPEG to pixels in the pool, beside Pillow's decode and resize alone
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import AreaLimits, ImageSize, ModelInfo, read_model_info
from pipeline.transport.slots import SlotAllocator, align
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import GridTHW
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep, StepPlan
from pipeline.wire.topology import Role, WorkerId
from tools.bench_engine import (
    NUM_STREAMS,
    Row,
    matmul_rate,
    measure,
    percentile,
    raise_failed,
    serve,
    streams_beside,
)
from tools.bench_serving import Result, Workload, open_session, parse_sizes, run_load, send
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.trace import read_spans
from workers.llm.model_runner import ModelRunner
from workers.llm.parallel import TensorParallel
from workers.nn.loader import choose_dtype
from workers.nn.weights.registry import open_weights
from workers.preprocess.images import decode, read_size
from workers.preprocess.media import PictureSource
from workers.preprocess.readers import MediaReaders, ReadLimits
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.registry import tower_of

PARTS = ("isolation", "loop", "ttft", "gate", "repeat", "forward", "together", "decode")
SIZES = ((448, 448), (1792, 1344))
SHARINGS = ("fixed", "split", "elastic")
MOST_IMAGES = {SIZES[0]: 60, SIZES[1]: 8}  # that can be answered while the streams run
CPU = torch.device("cpu")


class Bench:
    def __init__(self, folder: Path, rounds: int, num_output: int, sizes: Sequence[tuple[int, int]]) -> None:
        self.folder, self.rounds, self.num_output, self.sizes = folder, rounds, num_output, sizes
        self.dtype = choose_dtype("auto", CPU)
        self.info = read_model_info(folder)
        self.rng = random.Random(0)
        # P99 and longest gap under images
        self._worst: dict[tuple[str, tuple[int, int]], tuple[float, float]] = {}
        self._rates: list[float] = []  # images a second, of each round of `_streams` with images

    # Isolation.

    def isolation(self) -> list[Row]:
        rows: list[Row] = []
        rates: dict[tuple[str, tuple[int, int]], float] = {}
        for sharing in SHARINGS:
            with serve(self.folder, "--cpu-sharing", sharing) as served:
                for size in self.sizes:
                    self._rates.clear()
                    alone, beside = self._medians(partial(self._streams, served.url), size)
                    self._worst[sharing, size] = beside
                    rates[sharing, size] = statistics.median(self._rates[1:])
                    rows += self._isolation_rows(f"--cpu-sharing {sharing}", size, alone, beside)
        for size in self.sizes:
            for other in SHARINGS[:-1]:
                what = f"{size[0]}x{size[1]}: elastic"
                theirs, ours = self._worst[other, size][0], self._worst["elastic", size][0]
                rows.append(_row(f"P99 ITL under images, {what}", ours, other, theirs))
                rate, against = rates["elastic", size], rates[other, size]
                rows.append(Row(f"images beside streams, {what}", rate, other, against or 1e-9, "images/s"))
        return rows

    def loop(self) -> list[Row]:
        rows: list[Row] = []
        loop = _InProcess(self.folder, self.num_output)
        for size in self.sizes:
            alone, beside = self._medians(loop.run, size)
            rows += self._isolation_rows("in-process loop", size, alone, beside)
            if (fixed := self._worst.get(("fixed", size))) is not None:
                rows.append(
                    _row(
                        f"longest gap, {size[0]}x{size[1]}: in-process loop",
                        beside[1],
                        "--cpu-sharing fixed",
                        fixed[1],
                    )
                )
        return rows

    def _medians(
        self, run: Callable[[tuple[int, int] | None], list[float]], size: tuple[int, int]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """P99 and longest gap in seconds, without images and with: medians over the rounds; a first round
        warms up."""
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(self.rounds + 1):
            for has_images in (False, True):
                gaps = run(size if has_images else None)
                if number:
                    found[has_images].append((percentile(gaps, 99), max(gaps)))
        p99, longest = (
            [statistics.median(values) for values in zip(*found[has_images], strict=True)]
            for has_images in (False, True)
        )
        return (p99[0], p99[1]), (longest[0], longest[1])

    def _isolation_rows(
        self, name: str, size: tuple[int, int], alone: tuple[float, float], beside: tuple[float, float]
    ) -> list[Row]:
        what = f"images {size[0]}x{size[1]}, {name}"
        return [
            _row(f"P99 ITL, {what}", beside[0], "the streams alone", alone[0]),
            _row(f"longest gap, {what}", beside[1], "the streams alone", alone[1]),
        ]

    def _streams(self, url: str, size: tuple[int, int] | None) -> list[float]:
        """Gaps of four streams while all of them run; two requests with an image of `size` each are always
        under way beside them."""
        streams = Workload(num_words=16, num_output=self.num_output, wants_token_ids=True)
        # What the round before has left under way is encoded to its end, though nobody waits for it: a small
        # image comes behind it.
        small = Workload(num_words=8, num_output=1, num_images=1)
        asyncio.run(_send_one(url, small.body(_chat(small, self.rng))))
        if size is None:
            return asyncio.run(streams_beside(url, streams, self.rng, None)).gaps
        images = Workload(num_words=8, num_output=1, num_images=1, sizes=(size,))
        # Made before: drawing and encoding them would hold up the loop that takes the streams' times.
        chats = images.chats(MOST_IMAGES.get(size, 20), self.rng)
        bodies = [
            json.dumps(images.body([{"role": "user", "content": content}])).encode() for (content,) in chats
        ]

        def other() -> bytes:
            if not bodies:
                raise RuntimeError(
                    "more images were answered than were made: ask for fewer --output-tokens, or a larger "
                    "model"
                )
            return bodies.pop()

        beside = asyncio.run(streams_beside(url, streams, self.rng, other))
        self._rates.append(len(beside.others) / (time.perf_counter() - beside.start))
        if size == SIZES[0] and not beside.others:  # a large one may take longer than the streams
            raise RuntimeError("no image was answered while the streams ran: ask for more --output-tokens")
        return beside.gaps

    # One request, or eight.

    def ttft(self) -> list[Row]:
        load = Workload(num_words=16, num_output=1, num_images=4)
        setups = {
            "two ViTs": ("--vit", "2", "--vit-cores", "2"),
            "one ViT": ("--vit", "1", "--vit-cores", "1"),
        }
        found: dict[str, list[float]] = {name: [] for name in setups}
        with serve(self.folder, *setups["two ViTs"]) as two, serve(self.folder, *setups["one ViT"]) as one:
            for number in range(self.rounds + 1):
                for name, served in zip(setups, (two, one), strict=True):
                    (result,) = self._ask(served.url, load, 1)
                    if number:
                        found[name].append(result.ttft)
        medians = {name: statistics.median(values) for name, values in found.items()}
        return [_row("TTFT, 4 images, two ViTs", medians["two ViTs"], "one ViT", medians["one ViT"])]

    def gate(self) -> list[Row]:
        """Waiting is put together from what was measured: until the last of the images was encoded, then the
        prefill of them all, which is the TTFT of the same images with a text before them that no prefix
        shares.
        """
        load = Workload(num_words=8, num_output=1, num_images=4)
        found: list[tuple[float, float]] = []
        with (
            tempfile.TemporaryDirectory() as spans,
            serve(self.folder, "--cpu-sharing", "fixed", "--trace-dir", spans) as served,
        ):
            for number in range(self.rounds + 1):
                ((content,),) = load.chats(1, self.rng)
                sent = time.monotonic()
                first = asyncio.run(
                    _send_one(served.url, load.body([{"role": "user", "content": content}]))
                ).ttft
                again = asyncio.run(
                    _send_one(
                        served.url, load.body([{"role": "user", "content": [content[-1], *content[:-1]]}])
                    )
                ).ttft
                if number:
                    encoded = max(span.end for span in read_spans(Path(spans))["vit.0"])
                    found.append((first, encoded - sent + again))
        gated, waiting = (statistics.median(values) for values in zip(*found, strict=True))
        return [_row("TTFT, 4 images, prefilled as they come", gated, "waiting for all of them", waiting)]

    def repeat(self) -> list[Row]:
        load = Workload(num_words=8, num_output=1, num_images=1)
        rows = []
        with serve(self.folder) as served:
            for place in ("before", "behind"):
                first, again = [], []
                for number in range(self.rounds + 1):
                    ((content,),) = load.chats(1, self.rng)
                    image = content[0]
                    times = []
                    for question in ("What is it?", "Which colour has it?"):
                        parts = [image, {"type": "text", "text": question}]
                        body = load.body(
                            [{"role": "user", "content": parts if place == "before" else parts[::-1]}]
                        )
                        times.append(asyncio.run(_send_one(served.url, body)).ttft)
                    if number:
                        first.append(times[0])
                        again.append(times[1])
                rows.append(
                    _row(
                        f"TTFT, an image seen before, {place} its text",
                        statistics.median(again),
                        "the first time",
                        statistics.median(first),
                    )
                )
        return rows

    def together(self) -> list[Row]:
        load = Workload(num_words=16, num_output=64, num_images=1)
        model = Qwen2VLForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype).eval()
        processor = Qwen2VLImageProcessorPil(
            min_pixels=self.info.vision.min_pixels, max_pixels=self.info.vision.max_pixels
        )
        ours, theirs = [], []
        with serve(self.folder) as served:
            self._ask(served.url, load, 2)
            for _ in range(self.rounds):
                start = time.perf_counter()
                self._ask(served.url, load, 8)
                ours.append(time.perf_counter() - start)
                theirs.append(sum(self._hugging_face(model, processor) for _ in range(2)) * 4)  # two of eight
        return [
            _row(
                "8 requests, an image and 64 tokens each",
                statistics.median(ours),
                "Hugging Face, one by one (2 of 8 measured)",
                statistics.median(theirs),
            )
        ]

    def _hugging_face(self, model: Any, processor: Any) -> float:
        pixels = np.random.default_rng(self.rng.getrandbits(63)).integers(
            0, 256, (448, 448, 3), dtype=np.uint8
        )
        start = time.perf_counter()
        processed = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        count = int(processed["image_grid_thw"].prod()) // 4
        ids = torch.tensor(
            [
                [
                    *self.rng.choices(range(100, 4000), k=8),
                    *[self.info.image_token_id] * count,
                    *self.rng.choices(range(100, 4000), k=16),
                ]
            ]
        )
        types = (ids == self.info.image_token_id).int()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
                pixel_values=processed["pixel_values"].to(self.dtype),
                image_grid_thw=processed["image_grid_thw"], do_sample=False, min_new_tokens=64,
                max_new_tokens=64,
            )  # fmt: skip
        return time.perf_counter() - start

    def _ask(self, url: str, load: Workload, count: int) -> list[Result]:
        results = asyncio.run(run_load(url, load, load.chats(count, self.rng), count, 0.0, self.rng))
        raise_failed(results)
        return results

    # Parts of the way.

    def forward(self) -> list[Row]:
        info = self.info.vision
        torch.set_num_threads(os.cpu_count() or 1)
        weights = open_weights(self.folder, self.dtype, CPU)
        engine = TorchEngine(tower_of(self.info).encoder(info, weights))
        tower = (
            Qwen2VLForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype).eval().model.visual
        )
        weights = sum(parameter.numel() for block in tower.blocks for parameter in block.parameters())
        rows = []
        for side in (32, 64):
            grid = GridTHW(1, side, side)
            pixels = torch.zeros(1, side * info.patch_size, side * info.patch_size, 3, dtype=torch.uint8)
            output = torch.empty(info.num_tokens(grid), info.embedding_width, dtype=self.dtype)
            job = EncodeJob(pixels, grid, output)
            patches, grids = torch.zeros(side * side, 1176, dtype=self.dtype), torch.tensor([list(grid)])

            def hugging_face(patches: torch.Tensor = patches, grids: torch.Tensor = grids) -> None:
                with torch.inference_mode():
                    tower(patches, grid_thw=grids)

            ours, theirs = [], []
            for number in range(self.rounds + 1):
                times = [_seconds(partial(engine.encode, [job])), _seconds(hugging_face)]
                if number:
                    ours.append(times[0])
                    theirs.append(times[1])
            best = statistics.median(ours)
            count = side * side
            flop = 2 * count * weights + 4 * count * count * info.embed_dim * info.depth
            rows.append(
                Row(
                    f"encoder, {count} patches",
                    count / best,
                    "Hugging Face",
                    count / statistics.median(theirs),
                    "patches/s",
                )
            )
            rows.append(
                Row(
                    f"encoder, {count} patches",
                    flop / best / 1e9,
                    "matrix products",
                    matmul_rate(self.dtype) / 1e9,
                    "GFLOP/s",
                )
            )
        return rows

    def decode(self) -> list[Row]:
        pixels = np.asarray(
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 67, 3), dtype=np.uint8)).resize(
                (4032, 3024)
            )
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()
        size = seen_size(read_size(data, 10**8, ""), self.info)
        nbytes = align(size.height * size.width * 3)
        pool, slots = TensorPool.on_host("bench", 1, 2 * nbytes, 8), SlotAllocator(2 * nbytes, nbytes, 8)
        slot = slots.allocate(nbytes)
        assert slot is not None
        handle = pool.lend(slot, (1, *size, 3), "uint8")
        out = pool.array(handle)
        readers = MediaReaders(pool.info.memory_fd, 1, ReadLimits(60.0, 60.0, 10**8, 4096), "pyav")

        async def ready() -> bytes:
            return data

        async def ours() -> None:
            found = await readers.inspect_picture(data, "")
            seen_size(found, self.info)
            await PictureSource(ready, "", readers).decode((0,), out, handle.offset)

        def pillow() -> None:
            Image.open(io.BytesIO(data)).convert("RGB").resize(
                (size.width, size.height), Image.Resampling.BICUBIC
            )

        with asyncio.Runner() as runner:
            rounds = range(2 * self.rounds + 1)
            times = [(_seconds(lambda: runner.run(ours())), _seconds(pillow)) for _ in rounds][1:]
            runner.run(readers.close())
            assert np.array_equal(out[0], decode(data, ImageSize(*size), ""))
        pool.close()
        mine, theirs = (statistics.median(values) for values in zip(*times, strict=True))
        return [_row(f"12-megapixel JPEG to {size.width}x{size.height}", mine, "Pillow alone", theirs)]


class _InProcess:
    """The same runner and the same encoder in one thread, all cores for both: an image that has come is
    encoded between two steps."""

    def __init__(self, folder: Path, num_output: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self._info, self._num_output = read_model_info(folder), num_output
        config = Config(model=ModelConfig(max_model_len=4096), llm=LlmConfig(max_num_seqs=NUM_STREAMS + 1))
        self._runner = ModelRunner.load(
            self._info, config, folder, CPU, TensorParallel(), lambda done, total: None
        )
        self._block_size = config.llm.block_size
        self._blocks = 4096 // self._block_size
        self._runner.open_cache((NUM_STREAMS + 1) * self._blocks, 4096)
        dtype = choose_dtype("auto", CPU)
        weights = open_weights(folder, dtype, CPU)
        self._engine = TorchEngine(tower_of(self._info).encoder(self._info.vision, weights))
        self._dtype = dtype
        self._step = 0

    def run(self, size: tuple[int, int] | None) -> list[float]:
        """Gaps of four streams; with `size` there is always another image of that size to encode and its
        prompt to compute, 16 tokens a step."""
        gaps: list[float] = []
        starts = [self._start(slot, [5] * 32) for slot in range(NUM_STREAMS)]
        self._launch([SequenceStep(slot, 32) for slot in range(NUM_STREAMS)], starts)
        num_prompt = num_computed = 0
        last = time.perf_counter()
        for _ in range(self._num_output):
            steps = [SequenceStep(slot) for slot in range(NUM_STREAMS)]
            starts = []
            if size and num_computed >= num_prompt:
                num_prompt, num_computed = self._encode(size) + 16, 0
                starts = [self._start(NUM_STREAMS, [9] * num_prompt)]
            if num_computed < num_prompt:
                num_tokens = min(16, num_prompt - num_computed)
                steps.append(SequenceStep(NUM_STREAMS, num_tokens))
                num_computed += num_tokens
            self._launch(steps, starts)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        return gaps

    def _encode(self, size: tuple[int, int]) -> int:
        vision = self._info.vision
        target = seen_size(ImageSize(size[1], size[0]), self._info)
        grid = vision.grid_of(target)
        output = torch.empty(vision.num_tokens(grid), vision.embedding_width, dtype=self._dtype)
        self._engine.encode([EncodeJob(torch.zeros(1, *target, 3, dtype=torch.uint8), grid, output)])
        return len(output)

    def _start(self, slot: int, token_ids: list[int]) -> SequenceStart:
        table = pack_int32(range(slot * self._blocks, (slot + 1) * self._blocks))
        sampling = SamplingParams(temperature=0, seed=0)
        return SequenceStart(slot, len(token_ids), sampling, pack_int32(token_ids), block_table=table)

    def _launch(self, steps: Sequence[SequenceStep], starts: Sequence[SequenceStart]) -> None:
        self._step += 1
        plan = StepPlan(
            sender=WorkerId(Role.LLM), epoch=1, step=self._step, started=tuple(starts), sequences=tuple(steps)
        )
        self._runner.launch(plan).result()


def seen_size(size: ImageSize, info: ModelInfo) -> ImageSize:
    limits = AreaLimits(info.vision.min_pixels, info.vision.max_pixels)
    return info.family.picture_size(size, limits, info)


def _chat(load: Workload, rng: random.Random) -> list[dict[str, Any]]:
    ((content,),) = load.chats(1, rng)
    return [{"role": "user", "content": content}]


async def _send_one(url: str, body: dict[str, Any]) -> Result:
    async with open_session() as session:
        result = await send(session, url, body)
    raise_failed([result])
    return result


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _row(what: str, ours: float, against: str, theirs: float) -> Row:
    return Row(what, ours * 1000, against, theirs * 1000, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.3b", choices=SHAPES, help="of the random checkpoint")
    parser.add_argument("--model", type=Path, help="a checkpoint to measure instead")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=400, help="of each stream of `isolation`")
    parser.add_argument(
        "--sizes",
        type=parse_sizes,
        default=SIZES,
        metavar="WxH,…",
        help="of the images of isolation and loop, smallest first",
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            make_checkpoint(folder, args.shape)
        bench = Bench(folder, args.rounds, args.output_tokens, args.sizes)
        cores = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(
            f"{cores}, {args.model or args.shape}, {bench.dtype}; median of {args.rounds} rounds\n",
            flush=True,
        )
        measure(bench, args.parts, args.json)


if __name__ == "__main__":
    main()
