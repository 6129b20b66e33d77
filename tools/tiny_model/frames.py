"""What the vision tower alone learns from: endless batches of labelled pictures of all kinds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tools.tiny_model.pictures import (
    WORDS,
    Arrays,
    Picture,
    as_arrays,
    draw_chart,
    draw_clip,
    draw_clothes,
    draw_emoji,
    draw_glyphs,
    draw_photo,
    draw_print,
    draw_sheet,
    of_scene,
)
from tools.tiny_model.scenes import SIZE_WEIGHTS, SIZES, make_scene

KINDS = {
    "scene": 10,
    "crowd": 28,
    "print": 18,
    "glyphs": 22,
    "clothes": 7,
    "wardrobe": 10,
    "emoji": 3,
    "emoji sheet": 8,
    "chart": 4,
    "photo": 1,
    "clip": 8,
}


class Frames(NamedTuple):
    pixels: Tensor  # [N, 2, height, width, 3] uint8
    classes: Tensor  # [N, rows, columns, heads] int64
    mass: Tensor  # [N, rows, columns, counted] float32

    def to(self, device: torch.device) -> Frames:
        return Frames(*(part.to(device, non_blocking=True) for part in self))


def draw_picture(kind: str, rng: random.Random, size: tuple[int, int]) -> Picture | None:
    match kind:
        case "scene":
            return of_scene(make_scene(rng, odd=0.5), size)
        case "crowd":
            return of_scene(make_scene(rng, rng.randint(5, 9), odd=rng.choice((0.0, 0.5)), alike=0.6), size)
        case "print":
            letters = "abcdefghijklmnopqrstuvwxyz"
            word = (
                rng.choice(WORDS)
                if rng.random() < 0.3
                else "".join(rng.choice(letters) for _ in range(rng.randint(1, 5)))
            )
            text = word if rng.random() < 0.4 else str(rng.randint(0, 999))
            return draw_print(rng, size, text, False)[0]
        case "glyphs":
            return draw_glyphs(rng, size)
        case "wardrobe":
            return draw_sheet(rng, size, rng.choice((2, 2, 3)), "clothes")
        case "emoji sheet":
            return draw_sheet(rng, size, rng.choice((2, 2, 3)), "emoji")
        case "clothes":
            return found[0] if (found := draw_clothes(rng, size, False)) else None
        case "emoji":
            return drawn[0] if (drawn := draw_emoji(rng, size, False)) else None
        case "chart":
            return draw_chart(rng, size)[0]
        case "photo":
            return draw_photo(rng, size, False)
        case _:
            return clip[0] if (clip := draw_clip(rng, size, False)) else None


class FrameBatches(IterableDataset[Frames]):
    """All pictures of a batch have one size.

    The seed and the step name a batch, so that training can go on anywhere.
    """

    def __init__(self, batch_size: int, seed: int, first_step: int) -> None:
        self.batch_size, self.seed, self.first_step = batch_size, seed, first_step

    def __iter__(self) -> Iterator[Frames]:
        worker = get_worker_info()  # of several, each draws its share; the loader asks them in turn
        step = self.first_step + (worker.id if worker else 0)
        while True:
            rng = random.Random(f"{self.seed} {step}")
            size = rng.choices(SIZES, SIZE_WEIGHTS)[0]
            drawn: list[Arrays] = []
            while sum(len(arrays.pixels) for arrays in drawn) < self.batch_size:
                picture = draw_picture(rng.choices(list(KINDS), list(KINDS.values()))[0], rng, size)
                if picture is not None:
                    drawn.append(as_arrays(picture))
            yield Frames(
                *(
                    torch.from_numpy(np.concatenate(part)[: self.batch_size])
                    for part in zip(*drawn, strict=True)
                )
            )
            step += worker.num_workers if worker else 1
