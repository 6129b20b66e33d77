"""Lessons as tensors: endless batches for tower and decoder together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from tools.tiny_model.labels import COUNTED, HEADS, IGNORED, TOKEN
from tools.tiny_model.lessons import KINDS, make_lesson
from tools.tiny_model.pictures import Picture, as_arrays
from tools.tiny_model.scenes import SIZE_WEIGHTS, SIZES
from tools.tiny_model.teacher import TRAINING, Lesson, Teacher

POOL = 160  # lessons that are sorted by length before they are cut into batches


class Conversation(NamedTuple):
    token_ids: list[int]
    targets: list[int]  # IGNORED but for the answers
    pictures: list[Picture]


class Batch(NamedTuple):
    # [num_frames, 2, height, width, 3] uint8: the temporal patches of all pictures, in the order of their
    # tokens
    pixels: Tensor
    classes: Tensor  # [num_frames, rows, columns, heads] int64
    mass: Tensor  # [num_frames, rows, columns, counted] float32
    image_grids: Tensor  # [num_images, 3] int64
    video_grids: Tensor  # [num_videos, 3] int64
    token_ids: Tensor  # [num_lessons, length] int64, padded with 0 at the end
    targets: Tensor  # like token_ids

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def num_tokens(picture: Picture) -> int:
    width, height = picture.frames[0].size
    return len(picture.labels) * (width // TOKEN) * (height // TOKEN)


def _pad_token(picture: Picture) -> str:
    return "<|video_pad|>" if picture.is_video else "<|image_pad|>"


def converse(lesson: Lesson, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    """The lesson as the chat template has it, with its pictures' placeholders repeated."""
    talk = Conversation([], [], [])

    def say(text: str, learn: bool = False) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        talk.token_ids.extend(ids)
        talk.targets.extend(ids if learn else [IGNORED] * len(ids))

    if lesson.system:
        say(f"<|im_start|>system\n{lesson.system}<|im_end|>\n")
    for turn in lesson.turns:
        vision = "".join(
            f"<|vision_start|>{_pad_token(picture) * num_tokens(picture)}<|vision_end|>"
            for picture in turn.pictures
        )
        talk.pictures.extend(turn.pictures)
        text = turn.text + vision if lesson.has_text_first else vision + turn.text
        say(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        say(f"{turn.answer}<|im_end|>", learn=True)
        say("\n")
    return talk


def collate(talks: Sequence[Conversation], size: tuple[int, int]) -> Batch:
    length = max(len(talk.token_ids) for talk in talks)
    token_ids = torch.zeros(len(talks), length, dtype=torch.int64)
    targets = torch.full_like(token_ids, IGNORED)
    for row, talk in enumerate(talks):
        token_ids[row, : len(talk.token_ids)] = torch.tensor(talk.token_ids)
        targets[row, : len(talk.targets)] = torch.tensor(talk.targets)
    pictures = [picture for talk in talks for picture in talk.pictures]
    arrays = [as_arrays(picture) for picture in pictures]
    rows, columns = size[1] // TOKEN * 2, size[0] // TOKEN * 2
    grids: tuple[list[list[int]], list[list[int]]] = ([], [])
    for picture in pictures:
        grids[picture.is_video].append([len(picture.labels), rows, columns])
    if arrays:
        pixels, classes, mass = (torch.from_numpy(np.concatenate(part)) for part in zip(*arrays, strict=True))
    else:
        pixels = torch.zeros(0, 2, size[1], size[0], 3, dtype=torch.uint8)
        classes = torch.zeros(0, rows // 2, columns // 2, len(HEADS), dtype=torch.int64)
        mass = torch.zeros(0, rows // 2, columns // 2, len(COUNTED))
    image_grids, video_grids = (torch.tensor(grid, dtype=torch.int64).reshape(-1, 3) for grid in grids)
    return Batch(pixels, classes, mass, image_grids, video_grids, token_ids, targets)


class LessonBatches(IterableDataset[tuple[int, Batch]]):
    """Numbers of pools with their batches of at most `max_tokens` tokens, padding included; all pictures of a
    batch have one size.

    The seed and the number of a pool name its batches, so that training can go on where it stopped, to the
    pool.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_tokens: int, seed: int, first_pool: int = 0
    ) -> None:
        self.tokenizer, self.max_tokens, self.seed, self.first_pool = tokenizer, max_tokens, seed, first_pool

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        kinds, weights = list(KINDS), [kind.weight for kind in KINDS.values()]
        worker = get_worker_info()  # of several, each makes its share of the pools
        pool = self.first_pool + (worker.id if worker else 0)
        while True:
            rng = random.Random(f"{self.seed} {pool}")
            size = rng.choices(SIZES, SIZE_WEIGHTS)[0]
            teacher = Teacher(rng, TRAINING, size)
            talks = [
                converse(make_lesson(teacher, kind), self.tokenizer)
                for kind in rng.choices(kinds, weights, k=POOL)
            ]
            talks.sort(key=lambda talk: len(talk.token_ids))
            batches: list[list[Conversation]] = [[]]
            for talk in talks:
                if batches[-1] and len(talk.token_ids) * (len(batches[-1]) + 1) > self.max_tokens:
                    batches.append([])
                batches[-1].append(talk)
            rng.shuffle(batches)
            for talks in batches:
                yield pool, collate(talks, size)
            pool += worker.num_workers if worker else 1
