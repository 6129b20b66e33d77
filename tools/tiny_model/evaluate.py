"""Accuracy of the embedded model per skill, asked through the server: `python -m tools.tiny_model.evaluate`.

Starts a server of its own, with the launcher's options that stand after `--`, or asks one that runs
(`--url`), in OpenAI's protocol. An answer counts when it is right to the letter. Conversations are sent as
people send them: earlier turns with their right answers, pictures in the turn where they were shown. With
`--transformers`, the same questions go to transformers, in fp32, and the two are compared: this is the
end-to-end check of accuracy, for any data type, ViT engine, and, with `--twice`, for answers that come from
the caches. Needs transformers (`pip install -e '.[test]'`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from launcher.checkpoints import EMBEDDED
from tools.bench_engine import serve
from tools.tiny_model import assets
from tools.tiny_model.batches import converse
from tools.tiny_model.exams import SKILLS, SPLITS, Exam, exams, needs_assets
from tools.tiny_model.pictures import as_arrays
from tools.tiny_model.teacher import Turn
from tools.tiny_model.tower import PATCH, to_patches

CONCURRENCY = 16


class Answer(NamedTuple):
    text: str
    num_cached_tokens: int = 0


def _url(frame: Image.Image) -> str:
    file = io.BytesIO()
    frame.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def content_of(turn: Turn, has_text_first: bool) -> list[dict[str, Any]]:
    media: list[dict[str, Any]] = [
        {"type": "video_url", "video_url": {"url": [_url(frame) for frame in picture.frames]}}
        if picture.is_video
        else {"type": "image_url", "image_url": {"url": _url(picture.frames[0])}}
        for picture in turn.pictures
    ]
    text = {"type": "text", "text": turn.text}
    return [text, *media] if has_text_first else [*media, text]


def messages_of(exam: Exam) -> list[dict[str, Any]]:
    """The conversation up to its last question."""
    lesson = exam.lesson
    messages: list[dict[str, Any]] = [{"role": "system", "content": lesson.system}] if lesson.system else []
    for turn in lesson.turns:
        messages.append({"role": "user", "content": content_of(turn, lesson.has_text_first)})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


async def ask_server(url: str, asked: Sequence[Exam]) -> list[Answer]:
    """Greedy answers of the server, many at once. Raises RuntimeError with its words when it refuses one."""
    limit = asyncio.Semaphore(CONCURRENCY)

    async def ask(session: aiohttp.ClientSession, exam: Exam) -> Answer:
        async with limit:
            body = {"messages": messages_of(exam), "temperature": 0, "max_tokens": 120}
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                answer = await response.json(content_type=None)
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer['error']['message']}")
        details = answer["usage"].get("prompt_tokens_details") or {}
        return Answer(answer["choices"][0]["message"]["content"], details.get("cached_tokens") or 0)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        return await asyncio.gather(*(ask(session, exam) for exam in asked))


class Transformers:
    """The same model in transformers, in fp32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    @torch.inference_mode()
    def is_right(self, exam: Exam) -> bool:
        """Whether greedy decoding gives the right answer: every one of its tokens is the best one after those
        before it."""
        talk = converse(exam.lesson, self._tokenizer)
        # after the answer stands a line break that nobody asked for
        token_ids = torch.tensor([talk.token_ids[:-1]])
        types = (token_ids == self._model.config.image_token_id).int() + 2 * (
            token_ids == self._model.config.video_token_id
        ).int()
        media: dict[str, Tensor] = {}
        for is_video, names in (
            (False, ("pixel_values", "image_grid_thw")),
            (True, ("pixel_values_videos", "video_grid_thw")),
        ):
            pixels = [
                torch.from_numpy(as_arrays(picture).pixels)
                for picture in talk.pictures
                if picture.is_video == is_video
            ]
            if pixels:
                grids = [
                    [len(frames), frames.shape[2] // PATCH, frames.shape[3] // PATCH] for frames in pixels
                ]
                media |= dict(
                    zip(
                        names,
                        (
                            torch.cat([to_patches(frames).flatten(0, 1) for frames in pixels]),
                            torch.tensor(grids),
                        ),
                        strict=True,
                    )
                )
        logits = self._model(input_ids=token_ids, mm_token_type_ids=types, **media).logits[0]
        answer = self._tokenizer.encode(f"{exam.lesson.turns[-1].answer}<|im_end|>", add_special_tokens=False)
        return bool((logits[-len(answer) - 1 : -1].argmax(-1) == token_ids[0, -len(answer) :]).all())


def table_of(asked: Sequence[Exam], right: Sequence[bool]) -> dict[str, dict[str, list[int]]]:
    """[right, asked] per skill and split."""
    table: dict[str, dict[str, list[int]]] = defaultdict(lambda: {split: [0, 0] for split in SPLITS})
    for exam, is_right in zip(asked, right, strict=True):
        cell = table[exam.skill][exam.split]
        cell[0] += is_right
        cell[1] += 1
    return dict(table)


def print_table(table: dict[str, dict[str, list[int]]]) -> None:
    print(f"\n| skill | {' | '.join(SPLITS)} |\n| --- |{' --- |' * len(SPLITS)}")
    for skill, row in table.items():
        cells = (f"{right / total:.1%} of {total}" if total else "" for right, total in row.values())
        print(f"| {skill} | {' | '.join(cells)} |")


def compare(asked: Sequence[Exam], right: Sequence[bool], count: int, folder: Path) -> dict[str, int]:
    """Of the first `count` of each skill and split: how often either is right, and how often they differ."""
    judge = Transformers(folder)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    result = {"asked": 0, "server right": 0, "transformers right": 0, "differ": 0}
    for exam, is_right in zip(asked, right, strict=True):
        seen[exam.skill, exam.split] += 1
        if seen[exam.skill, exam.split] > count:
            continue
        reference = judge.is_right(exam)
        result["asked"] += 1
        result["server right"] += is_right
        result["transformers right"] += reference
        result["differ"] += is_right != reference
    return result


def evaluate(url: str, args: argparse.Namespace) -> int:
    asked = exams(args.skills, args.count)
    answers = asyncio.run(ask_server(url, asked))
    right = [answer.text == exam.lesson.turns[-1].answer for exam, answer in zip(asked, answers, strict=True)]
    table = table_of(asked, right)
    print_table(table)
    if (lacking := assets.missing(for_exams=True)) and any(map(needs_assets, args.skills)):
        print(
            f"\nsome questions are not those of docs/embedded-model.md: {len(lacking)} files of what they "
            f"show are not here, {lacking[0]} for one"
        )
        print("(python -m tools.tiny_model.assets fetches most of them, pip install -e '.[test]' the photos)")
    if not_asked := [skill for skill in args.skills if skill not in table]:
        print(f"not asked: {', '.join(not_asked)}")
    found: dict[str, Any] = {"accuracy": table}
    if args.show:
        wrong = [
            (exam, answer)
            for exam, answer, is_right in zip(asked, answers, right, strict=True)
            if not is_right
        ]
        for exam, answer in wrong[:: max(1, len(wrong) // args.show)]:
            turn = exam.lesson.turns[-1]
            print(f"{exam.skill}, {exam.split}: {turn.text!r}: {answer.text!r} instead of {turn.answer!r}")
    if args.twice:
        again = asyncio.run(ask_server(url, asked))
        found["second time"] = {
            "asked": len(asked),
            "right": sum(
                answer.text == exam.lesson.turns[-1].answer for exam, answer in zip(asked, again, strict=True)
            ),
            "differ from the first": sum(
                one.text != two.text for one, two in zip(answers, again, strict=True)
            ),
            "with cached tokens": sum(answer.num_cached_tokens > 0 for answer in again),
        }
    if args.transformers:
        found["beside transformers"] = compare(
            asked, right, args.transformers, args.model or EMBEDDED / "model"
        )
    for name in ("second time", "beside transformers"):
        if name in found:
            print(f"\n{name}: {found[name]}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="", help="a server that runs; without, one is started")
    parser.add_argument("--model", type=Path, help="checkpoint (default: the embedded one)")
    parser.add_argument("--count", type=int, default=100, help="questions of each skill and split")
    parser.add_argument("--skills", nargs="+", default=list(SKILLS), choices=list(SKILLS), metavar="SKILL")
    parser.add_argument(
        "--transformers", type=int, default=0, metavar="N", help="ask transformers the first N of each, too"
    )
    parser.add_argument(
        "--twice", action="store_true", help="ask everything a second time, when the caches know it"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="about so many wrong answers")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.url and options:
        parser.error(f"{' '.join(options)}: the server at --url has options of its own")
    if args.url and args.model and not args.transformers:
        parser.error("--model is for --transformers here: the server at --url has its own")
    if args.url:
        return evaluate(args.url, args)
    with serve(args.model or EMBEDDED / "model", *options) as served:
        return evaluate(served.url, args)


if __name__ == "__main__":
    sys.exit(main())
