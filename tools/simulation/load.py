"""The load: when requests arrive, and what is in them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from pipeline.families import AreaLimits, ImageSize, ModelInfo
from pipeline.wire.base import GridTHW


class Picture(NamedTuple):
    content: bytes  # equal for equal pictures
    megapixels: float  # as it comes
    grid: GridTHW  # as the ViT sees it
    num_tokens: int
    pixel_bytes: int


@dataclass(frozen=True, slots=True)
class Submission:
    number: int
    at: float  # seconds from the start; with a closed loop not before another request has ended
    num_text_tokens: int
    num_output: int
    pictures: tuple[Picture, ...] = ()
    num_shared_tokens: int = 0  # the first ones of the text, which all requests share

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_text_tokens + sum(picture.num_tokens for picture in self.pictures)


class Load(NamedTuple):
    submissions: Sequence[Submission]  # by time
    concurrency: int = 0  # requests at a time; 0: as they arrive


class Traced(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a trace file."""

    at: float
    text_tokens: int
    output_tokens: int
    images: tuple[str, ...] = ()  # WIDTHxHEIGHT, or WIDTHxHEIGHT=NAME: pictures of one name are equal
    shared_tokens: int = 0


class Shape(NamedTuple):
    """Of random requests."""

    num_requests: int
    num_text_tokens: int
    num_output: int
    sizes: Sequence[tuple[int, int]] = ((448, 448),)  # width, height
    num_pictures: int = 0
    num_shared_pictures: int = 0  # among which pictures are drawn; 0: all differ
    num_shared_tokens: int = 0
    share_with_pictures: float = 1.0  # of the requests


class Camera:
    """Makes pictures of a size as the model sees them."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info

    def picture(self, width: int, height: int, name: str) -> Picture:
        vision = self._info.vision
        limits = AreaLimits(vision.min_pixels, vision.max_pixels)
        seen = self._info.family.picture_size(ImageSize(height, width), limits, self._info)
        grid = vision.grid_of(seen)
        content = hashlib.sha256(f"{name} {width}x{height}".encode()).digest()
        pixels = seen.height * seen.width
        return Picture(content, width * height / 1e6, grid, vision.num_tokens(grid), 3 * pixels)


def random_load(
    shape: Shape, camera: Camera, rng: random.Random, rate: float = 0.0, concurrency: int = 0
) -> Load:
    """Poisson arrivals at `rate` a second, or a closed loop of `concurrency`. Raises ValueError for neither
    or both."""
    if (rate > 0) == (concurrency > 0):
        raise ValueError("a load has either a rate of requests a second, or a number of requests at a time")
    shared = [
        camera.picture(*rng.choice(shape.sizes), f"shared {n}") for n in range(shape.num_shared_pictures)
    ]
    at, submissions = 0.0, list[Submission]()
    for number in range(shape.num_requests):
        at += rng.expovariate(rate) if rate else 0.0
        count = shape.num_pictures if rng.random() < shape.share_with_pictures else 0
        pictures = tuple(
            rng.choice(shared) if shared else camera.picture(*rng.choice(shape.sizes), f"{number} {index}")
            for index in range(count)
        )
        submissions.append(
            Submission(number, at, shape.num_text_tokens, shape.num_output, pictures, shape.num_shared_tokens)
        )
    return Load(submissions, concurrency)


def read_trace(path: Path, camera: Camera) -> Load:
    """Requests of a file, a JSON object a line (`Traced`), at the times that they name. Raises ValueError."""
    try:
        lines = msgspec.json.Decoder(Traced).decode_lines(path.read_bytes())
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no trace of requests: {error}") from None
    if not lines:
        raise ValueError(f"{path} has no requests")
    lines.sort(key=lambda line: line.at)
    submissions = []
    for number, line in enumerate(lines):
        pictures = tuple(_named(text, f"{number} {i}", camera.picture) for i, text in enumerate(line.images))
        shared = line.shared_tokens
        submissions.append(
            Submission(number, line.at - lines[0].at, line.text_tokens, line.output_tokens, pictures, shared)
        )
    return Load(submissions)


def _named(text: str, name: str, make: Callable[[int, int, str], Picture]) -> Picture:
    size, _, given = text.partition("=")
    width, by, height = size.partition("x")
    if not by or not width.isdecimal() or not height.isdecimal():
        raise ValueError(f"{text!r} is no picture: WIDTHxHEIGHT, or WIDTHxHEIGHT=NAME")
    return make(int(width), int(height), f"named {given}" if given else name)
