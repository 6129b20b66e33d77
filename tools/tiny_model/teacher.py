"""What a lesson is, and what one is made with: a random stream, a split of what may be shown and asked, and
how to say and show it.

A `Lesson` is a chat of a few turns; each turn's `skill` names what it asks, so that accuracy can be told per
skill. Every question has exactly one right answer, to the letter. `Split` says whether a lesson is for
training or holds what training never shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tools.tiny_model.names import COLORS, SHAPES
from tools.tiny_model.phrases import loosely, say
from tools.tiny_model.pictures import Picture, of_scene
from tools.tiny_model.scenes import HELD_OUT_PAIRS, SIZE_WEIGHTS, SIZES, Scene, Thing, make_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third")


@dataclass(frozen=True, slots=True)
class Split:
    """What may be in a lesson. Clothing of the test pictures is in every split but TRAINING."""

    is_training: bool = False
    has_new_content: bool = False  # colour-shape pairs, places, fonts, renderings, photos never trained on
    has_new_phrases: bool = False  # wordings never trained on


TRAINING = Split(is_training=True)
NEW_SCENES, NEW_CONTENT, NEW_PHRASES = Split(), Split(has_new_content=True), Split(has_new_phrases=True)


@dataclass(frozen=True, slots=True)
class Turn:
    skill: str
    text: str
    answer: str
    pictures: tuple[Picture, ...] = ()  # shown with this turn
    # whether it is about what its split holds out: asks for it by name, or shows it where nothing is named
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class Lesson:
    turns: tuple[Turn, ...]
    system: str = ""
    has_text_first: bool = False  # before the pictures of its turn


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def place_of(cell: str) -> str:
    return {"center": "in the center", "left": "on the left", "right": "on the right"}.get(
        cell, f"at the {cell}"
    )


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def nth(index: int) -> str:
    return sentence(f"the {ORDINALS[index]} one")


def is_new_pair(thing: Thing) -> bool:
    return (thing.color, thing.shape) in HELD_OUT_PAIRS


def shown(turns: Sequence[Turn], *pictures: Picture) -> list[Turn]:
    """The turns, with the pictures shown in the first of them."""
    return [replace(turns[0], pictures=pictures), *turns[1:]]


def distinct(turns: Iterable[Turn | None]) -> list[Turn]:
    """Without those that could not be asked, and those that ask the same again."""
    return list({turn.text: turn for turn in turns if turn}.values())


class Teacher:
    """What all kinds of lessons of one split need: a random stream, wordings, and pictures, of one size where
    it is given."""

    def __init__(self, rng: random.Random, split: Split, size: tuple[int, int] | None = None) -> None:
        self.rng, self.split, self._size_of_all = rng, split, size

    def say(self, key: str, **fields: str) -> str:
        text = say(key, self.rng, self.split.has_new_phrases, **fields)
        return loosely(text, self.rng) if self.split.is_training else text

    def scene(self, count: int | None = None, alike: float = 0.0) -> Scene:
        return make_scene(self.rng, count, self.split.has_new_content, alike=alike)

    def show(self, scene: Scene, size: tuple[int, int] | None = None) -> Picture:
        return of_scene(scene, size or self.size())

    def size(self) -> tuple[int, int]:
        return self._size_of_all or self.rng.choices(SIZES, SIZE_WEIGHTS)[0]

    def some_name(self, like: Thing | None = None) -> str:
        """Colour and shape at random, of a thing that may be there or not, often one of them that of `like`.

        Pairs that are held out are not asked for elsewhere: asked for in training, where none is ever there,
        they would be learned as absent.
        """
        while True:
            color = like.color if like and self.rng.random() < 0.4 else self.rng.choice(list(COLORS))
            shape = like.shape if like and self.rng.random() < 0.4 else self.rng.choice(SHAPES)
            if self.split.has_new_content or (color, shape) not in HELD_OUT_PAIRS:
                return f"{color} {shape}"

    def shuffled(self, turns: list[Turn], picture: Picture) -> list[Turn]:
        self.rng.shuffle(turns)
        return shown(turns, picture)
