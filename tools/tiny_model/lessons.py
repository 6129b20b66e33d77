"""Conversations about pictures with their right answers: what the model learns from, and what it is examined on.

A `Lesson` is a chat of a few turns; each turn's `skill` names what it asks, so that accuracy can be told per skill. Every question
has exactly one right answer, to the letter. `Split` says whether a lesson is for training or holds what training never shows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tools.tiny_model import small_talk
from tools.tiny_model.names import CELLS, CHINESE, COLORS, DIRECTIONS, SHAPES
from tools.tiny_model.phrases import loosely, say
from tools.tiny_model.pictures import (
    WORDS,
    Clip,
    Picture,
    draw_chart,
    draw_clip,
    draw_clothes,
    draw_emoji,
    draw_photo,
    draw_print,
    of_scene,
)
from tools.tiny_model.scenes import HELD_OUT_PAIRS, SIZES, Scene, Thing, colors_on, is_at_held_out_place, make_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_NAMES = tuple(sorted(" ".join(pair) for pair in HELD_OUT_PAIRS))
ORDINALS = ("first", "second", "third")
EMPTY = "The picture is empty."
BARELY = 0.05  # a thing that covers less of a ninth of the picture is not in it
SIZE_WEIGHTS = (6, 1.5, 1.5, 1.5)
SYSTEMS = ("You are a helpful assistant.", "Answer in a few words.", "You answer questions about pictures.", "You are a vision model.", "Be brief.")


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
    is_new: bool = True  # whether it is about what its split holds out: asks for it by name, or shows it where nothing is named


@dataclass(frozen=True, slots=True)
class Lesson:
    turns: tuple[Turn, ...]
    system: str = ""
    has_text_first: bool = False  # before the pictures of its turn


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def place_of(cell: str) -> str:
    return {"center": "in the center", "left": "on the left", "right": "on the right"}.get(cell, f"at the {cell}")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


class Teacher:
    """Makes lessons of one split from one random stream, with pictures of one size where it is given."""

    def __init__(self, rng: random.Random, split: Split, size: tuple[int, int] | None = None) -> None:
        self.rng, self.split, self._size_of_all = rng, split, size

    def lesson(self, kind: str) -> Lesson:
        """A lesson of one of KINDS."""
        rng = self.rng
        turns: list[Turn] = []
        while not turns:
            turns = KINDS[kind].make(self)
        if rng.random() < 0.12 and kind != "talk":
            is_chained = kind in ("follow-up", "next picture")  # there, "it" means what the turn before it was about
            turns.insert(len(turns) if is_chained else rng.randint(1, len(turns)), self._unknown())
        return Lesson(tuple(turns), rng.choice(SYSTEMS) if rng.random() < 0.3 else "", rng.random() < 0.25)

    def say(self, key: str, **fields: str) -> str:
        text = say(key, self.rng, self.split.has_new_phrases, **fields)
        return loosely(text, self.rng) if self.split.is_training else text

    # Scenes of shapes

    def scene(self, count: int | None = None, alike: float = 0.0) -> Scene:
        return make_scene(self.rng, count, self.split.has_new_content, alike=alike)

    def show(self, scene: Scene, size: tuple[int, int] | None = None) -> Picture:
        return of_scene(scene, size or self.size())

    def size(self) -> tuple[int, int]:
        return self._size_of_all or self.rng.choices(SIZES, SIZE_WEIGHTS)[0]

    def shapes(self, count: int | None = None, num_turns: int | None = None) -> list[Turn]:
        scene = self.scene(count)
        if not scene.things:
            return self.blank()
        asked: list[Turn] = []
        for _ in range(num_turns or self.rng.randint(4, 8)):
            turn = self.about(scene)
            if all(turn.text != other.text for other in asked):
                asked.append(turn)
        return [replace(asked[0], pictures=(self.show(scene),)), *asked[1:]]

    def crowd(self, alike: float = 0.0) -> list[Turn]:
        """Many shapes: mostly counting. With `alike`, there are several of each colour and of each shape."""
        scene = self.scene(self.rng.randint(3, 9), alike)
        options = (self._count_of, self._count_of, self._count_of, self._exists, self.about)
        turns = [self._count(scene), *(self.rng.choice(options)(scene) for _ in range(6))]
        asked = list({turn.text: turn for turn in turns}.values())
        if alike:
            asked = [replace(turn, skill="count alike") if turn.skill.startswith("count") else turn for turn in asked]
        self.rng.shuffle(asked)
        return [replace(asked[0], pictures=(self.show(scene),)), *asked[1:]]

    def relations(self) -> list[Turn]:
        """What stands left of what, mixed with where they stand. Among other questions alone, this one would stay at chance."""
        scene = self.scene(self.rng.randint(2, 4))
        found = [self.rng.choice((self._relation, self._relation, self._where))(scene) for _ in range(10)]
        turns = list({turn.text: turn for turn in found if turn}.values())
        return [replace(turns[0], pictures=(self.show(scene),)), *turns[1:]] if turns else []

    def about(self, scene: Scene) -> Turn:
        """One random question about a scene that is not empty."""
        options: list[Callable[[Scene], Turn | None]] = [
            self._shape, self._colour, self._where, self._size, self._extreme, self._relation, self._count, self._count_of, self._exists,
            self._absent, self._at, self._describe, self._json,
        ]  # fmt: skip
        weights = (3, 3, 4, 1.5, 1, 2.5, 2, 2, 1.5, 0.7, 3, 2, 1.5)
        while True:
            if turn := self.rng.choices(options, weights)[0](scene):
                return turn

    def _is_new_pair(self, thing: Thing) -> bool:
        return (thing.color, thing.shape) in HELD_OUT_PAIRS

    def _shape(self, scene: Scene) -> Turn | None:
        thing = self.rng.choice(scene.things)
        answer = sentence(article(thing.shape))
        if len(scene.things) == 1 and self.rng.random() < 0.7:
            return Turn("shape", self.say("shape"), answer, is_new=self._is_new_pair(thing))
        if _is_clear(thing, scene) and self.rng.random() < 0.25:
            return Turn("shape", self.say("shape at", where=place_of(thing.cell)), answer, is_new=self._is_new_pair(thing))
        if sum(other.color == thing.color for other in scene.things) > 1:
            return None
        return Turn("shape", self.say("shape of color", color=thing.color), answer, is_new=self._is_new_pair(thing))

    def _colour(self, scene: Scene) -> Turn | None:
        thing = self.rng.choice(scene.things)
        answer = sentence(thing.color)
        if len(scene.things) == 1 and self.rng.random() < 0.5:
            return Turn("colour", self.say("colour"), answer, is_new=self._is_new_pair(thing))
        if _is_clear(thing, scene) and self.rng.random() < 0.25:
            return Turn("colour", self.say("colour at", where=place_of(thing.cell)), answer, is_new=self._is_new_pair(thing))
        if sum(other.shape == thing.shape for other in scene.things) > 1:
            return None
        return Turn("colour", self.say("colour of shape", name=thing.shape), answer, is_new=self._is_new_pair(thing))

    def _name(self, thing: Thing, scene: Scene) -> str | None:
        """A name that means this thing alone."""
        if sum(other.name == thing.name for other in scene.things) > 1:
            return None
        alone = sum(other.shape == thing.shape for other in scene.things) == 1
        return thing.shape if alone and self.rng.random() < 0.4 else thing.name

    def _some_name(self, like: Thing | None = None, shape: str = "") -> str:
        """Colour and shape at random, of a thing that may be there or not, often one of them that of `like`.

        Pairs that are held out are not asked for elsewhere: asked for in training, where none is ever there, they would be learned as absent.
        """
        while True:
            color = like.color if like and self.rng.random() < 0.4 else self.rng.choice(list(COLORS))
            its_shape = shape or (like.shape if like and self.rng.random() < 0.4 else self.rng.choice(SHAPES))
            if self.split.has_new_content or (color, its_shape) not in HELD_OUT_PAIRS:
                return f"{color} {its_shape}"

    def _where(self, scene: Scene) -> Turn | None:
        thing = self.rng.choice(scene.things)
        if not thing.has_clear_place or (name := self._name(thing, scene)) is None:
            return None
        return Turn("position", self.say("where", name=name), sentence(place_of(thing.cell)), is_new=is_at_held_out_place(thing))

    def _size(self, scene: Scene) -> Turn | None:
        thing = self.rng.choice(scene.things)
        if not thing.size or (name := self._name(thing, scene)) is None:
            return None
        return Turn("size", self.say("size", name=name), sentence(thing.size), is_new=self._is_new_pair(thing))

    def _extreme(self, scene: Scene) -> Turn | None:
        if len(scene.things) < 2:
            return None
        by_size = sorted(scene.things, key=lambda thing: thing.radius)
        if self.rng.random() < 0.5 and by_size[-1].radius > by_size[-2].radius * 1.3:
            return Turn("size", self.say("largest"), sentence(f"the {by_size[-1].name}"), is_new=self._is_new_pair(by_size[-1]))
        if by_size[0].radius * 1.3 < by_size[1].radius:
            return Turn("size", self.say("smallest"), sentence(f"the {by_size[0].name}"), is_new=self._is_new_pair(by_size[0]))
        return None

    def _relation(self, scene: Scene) -> Turn | None:
        if len(scene.things) < 2:
            return None
        one, other = self.rng.sample(scene.things, 2)
        names = self._name(one, scene), self._name(other, scene)
        relation, margin = self.rng.choice(
            (("left of", other.x - one.x), ("right of", one.x - other.x), ("above", other.y - one.y), ("below", one.y - other.y))
        )
        if names[0] is None or names[1] is None or abs(margin) < 0.2:
            return None
        text = self.say("relation", name=names[0], relation=relation, other=names[1])
        return Turn("relation", text, "Yes." if margin > 0 else "No.", is_new=self._is_new_pair(one) or self._is_new_pair(other))

    def _count(self, scene: Scene) -> Turn:
        return self._counted("count", len(scene.things))

    def _counted(self, key: str, number: int, **fields: str) -> Turn:
        return Turn(f"count {'0-5' if number <= 5 else '6-9'}", self.say(key, **fields), sentence(NUMBERS[number]))

    def _count_of(self, scene: Scene) -> Turn:
        """How many of one colour, or of one shape."""
        thing = self.rng.choice(scene.things)
        if self.rng.random() < 0.5:
            color = thing.color if self.rng.random() < 0.75 else self.rng.choice(list(COLORS))
            name, number = f"{color} shapes", sum(other.color == color for other in scene.things)
        else:
            shape = thing.shape if self.rng.random() < 0.75 else self.rng.choice(SHAPES)
            name, number = plural(shape), sum(other.shape == shape for other in scene.things)
        return self._counted("count of", number, name=name)

    def _exists(self, scene: Scene) -> Turn:
        thing = self.rng.choice(scene.things)
        # Nearly right where it is wrong, so that neither colour nor shape alone gives the answer.
        name = thing.name if self.rng.random() < 0.5 else self._some_name(thing)
        is_there = any(other.name == name for other in scene.things)
        is_new = name in HELD_OUT_NAMES
        if is_new and is_there and self.rng.random() < 0.6:  # or nearly all that are asked for would be there
            name = self.rng.choice(HELD_OUT_NAMES)
            is_there = any(other.name == name for other in scene.things)
        return Turn("exists", self.say("exists", name=article(name)), "Yes." if is_there else "No.", is_new=is_new)

    def _absent(self, scene: Scene) -> Turn | None:
        """A question about a thing that is not there."""
        if self.rng.random() < 0.5:  # something like it may be there
            name = self._some_name(self.rng.choice(scene.things))
            if any(thing.name == name for thing in scene.things):
                return None
            return Turn("absent", self.say("where", name=name), f"There is no {name}.")
        shape = self.rng.choice(SHAPES)
        if any(thing.shape == shape for thing in scene.things):
            return None
        return Turn("absent", self.say("colour of shape", name=shape), f"There is no {shape}.")

    def _at(self, scene: Scene) -> Turn | None:
        cell = self.rng.choice(CELLS) if self.rng.random() < 0.25 else self.rng.choice(scene.things).cell
        found = [thing for thing in scene.things if thing.cell == cell]
        if not all(_is_clear(thing, scene) for thing in (found or scene.things)):
            return None
        if not found and any(thing.covers(cell) > BARELY for thing in scene.things):
            return None
        answer = sentence(article(found[0].name)) if found else "Nothing."
        return Turn("position", self.say("at", where=place_of(cell)), answer, is_new=bool(found) and is_at_held_out_place(found[0]))

    def _describe(self, scene: Scene) -> Turn | None:
        if (answer := describe(scene)) is None:
            return None
        if len(scene.things) == 1 and self.rng.random() < 0.4:
            return Turn("describe", self.say("what"), sentence(article(scene.things[0].name)))
        return Turn("describe", self.say("describe"), answer)

    def _json(self, scene: Scene) -> Turn | None:
        ordered = _in_order(scene)
        if self.rng.random() < 0.5 and ordered is not None and len(ordered) < 4:
            return Turn("JSON", self.say("json"), as_json({"shapes": [{"color": thing.color, "shape": thing.shape} for thing in ordered]}))
        for _ in range(8):
            turn = self.rng.choice((self._shape, self._colour, self._count, self._count_of))(scene)
            if turn is not None:
                break
        else:
            return None
        value = turn.answer.rstrip(".").lower()
        key, content = (
            ("color", value) if turn.skill == "colour"
            else ("shape", value.split()[-1]) if turn.skill == "shape"
            else ("count", NUMBERS.index(value))
        )  # fmt: skip
        return Turn("JSON", self.say("as json", question=turn.text), as_json({key: content}))

    def blank(self) -> list[Turn]:
        """An empty ground: whatever is asked, the model says that nothing is there."""
        name = self._some_name()
        color, shape = name.split()
        questions: tuple[tuple[str, dict[str, str]], ...] = (
            ("shape", {}), ("colour", {}), ("what", {}), ("describe", {}), ("describe", {}), ("colour of shape", {"name": shape}),
            ("where", {"name": name}), ("shape of color", {"color": color}), ("number", {}), ("word", {}), ("emoji", {}),
            ("at", {"where": place_of(self.rng.choice(CELLS))}), ("size", {"name": shape}),
        )  # fmt: skip
        turns = [Turn("blank", self.say(key, **fields), EMPTY) for key, fields in self.rng.sample(questions, self.rng.randint(1, 3))]
        if self.rng.random() < 0.3:
            turns.append(Turn("count 0-5", self.say("count"), "Zero."))
        if self.rng.random() < 0.3:
            turns.append(Turn("exists", self.say("exists", name=article(name)), "No."))
        self.rng.shuffle(turns)
        picture = self.show(make_scene(self.rng, 0))
        return [replace(turns[0], pictures=(picture,)), *turns[1:]]

    # Conversations

    def follow_up(self) -> list[Turn]:
        """Two things; a question about one, then about "the other one", or about the same one as "it"."""
        scene = self.scene(2)
        if len(scene.things) < 2 or scene.things[0].shape == scene.things[1].shape or scene.things[0].color == scene.things[1].color:
            return []
        one, other = self.rng.sample(scene.things, 2)
        clear = all(_is_clear(thing, scene) for thing in (one, other))
        asks = self.rng.choice(("colour", "shape", "where", "at") if clear else ("colour", "shape"))
        texts = {
            "colour": lambda thing: (self.say("colour of shape", name=thing.shape), sentence(thing.color)),
            "shape": lambda thing: (self.say("shape of color", color=thing.color), sentence(article(thing.shape))),
            "where": lambda thing: (self.say("where", name=thing.name), sentence(place_of(thing.cell))),
            "at": lambda thing: (self.say("at", where=place_of(thing.cell)), sentence(article(thing.name))),
        }
        skills = {"colour": "colour", "shape": "shape", "where": "position", "at": "position"}
        text, answer = texts[asks](one)
        turns = [Turn(skills[asks], text, answer, (self.show(scene),), self._is_new_pair(one))]
        kind = self.rng.random()
        if kind < 0.6:
            turns.append(Turn("follow-up", self.say("other"), texts[asks](other)[1]))
            last = other
        elif kind < 0.75:
            names = {"colour": other.shape, "shape": f"{other.color} one", "where": other.name, "at": f"one {place_of(other.cell)}"}
            turns.append(Turn("follow-up", self.say("and name", name=names[asks]), texts[asks](other)[1]))
            last = other
        else:
            last = one
        more = [("colour it", sentence(last.color))] if asks in ("shape", "where") and kind > 0.3 else []
        more += [("shape it", sentence(article(last.shape)))] if asks == "colour" else []
        more += [("where it", sentence(place_of(last.cell)))] if asks in ("colour", "shape") and clear else []
        self.rng.shuffle(more)
        turns += [Turn("follow-up", self.say(key), answer) for key, answer in more[: self.rng.randint(0 if len(turns) > 1 else 1, 2)]]
        return turns if len(turns) > 1 else []

    def next_picture(self) -> list[Turn]:
        """One thing a picture; a second picture comes in a later turn: "And this one?"."""
        asks = self.rng.choice(("shape", "colour", "what"))
        turns = []
        for index in range(self.rng.randint(2, 3)):
            scene = self.scene(1)
            thing = scene.things[0]
            answer = {"shape": article(thing.shape), "colour": thing.color, "what": article(thing.name)}[asks]
            text = self.say(asks) if index == 0 else self.say("this one")
            turns.append(Turn("follow-up" if index else {"what": "describe"}.get(asks, asks), text, sentence(answer), (self.show(scene),)))
        return turns

    # Print, clothing, emoji, charts, photos

    def number(self) -> list[Turn]:
        text = str(self.rng.randint(0, 9) if self.rng.random() < 0.25 else self.rng.randint(10, 999))
        picture, truth = draw_print(self.rng, self.size(), text, self.split.has_new_content)
        turns = [Turn("digits", self.say("number"), f"{text}.")]
        options = [
            Turn("colour of print", self.say("colour of print", name="number"), sentence(truth.ink)),
            Turn("describe", self.say("describe"), f"The number {text}."),
            Turn("JSON", self.say("as json", question=self.say("number")), as_json({"number": int(text)})),
        ]
        turns += self.rng.sample(options, self.rng.randint(0, 2))
        return self._shuffled(turns, picture)

    def word(self) -> list[Turn]:
        text = self.rng.choice(WORDS)
        picture, truth = draw_print(self.rng, self.size(), text, self.split.has_new_content)
        turns = [Turn("words", self.say("word"), sentence(text))]
        options = [
            Turn("colour of print", self.say("colour of print", name="word"), sentence(truth.ink)),
            Turn("describe", self.say("describe"), f"The word {text}."),
        ]
        turns += self.rng.sample(options, self.rng.randint(0, 2))
        return self._shuffled(turns, picture)

    def clothes(self) -> list[Turn]:
        if (drawn := draw_clothes(self.rng, self.size(), not self.split.is_training)) is None:
            return self.shapes()
        answer = sentence(drawn[1] if drawn[1] == "trousers" else article(drawn[1]))
        key = self.rng.choice(("clothes", "clothes", "what", "describe"))
        return [Turn("clothing", self.say(key), answer, (drawn[0],))]

    def emoji(self) -> list[Turn]:
        if (drawn := draw_emoji(self.rng, self.size(), self.split.has_new_content)) is None:
            return self.shapes()
        key = self.rng.choice(("emoji", "what", "describe"))
        answer = sentence(f"the {drawn[1]}" if drawn[1] in ("sun", "moon") else "fire" if drawn[1] == "fire" else article(drawn[1]))
        return [Turn("emoji", self.say(key), answer, (drawn[0],))]

    def chart(self) -> list[Turn]:
        picture, chart = draw_chart(self.rng, self.size())
        by_height = [color for _, color in sorted(zip(chart.heights, chart.colors, strict=True))]
        one, other = self.rng.sample(range(len(chart.colors)), 2)
        is_higher = chart.heights[one] > chart.heights[other]
        options = [
            Turn("charts", self.say("highest"), sentence(f"the {by_height[-1]} bar")),
            Turn("charts", self.say("lowest"), sentence(f"the {by_height[0]} bar")),
            Turn("charts", self.say("bars"), sentence(NUMBERS[len(by_height)])),
            Turn("charts", self.say("higher", name=chart.colors[one], other=chart.colors[other]), "Yes." if is_higher else "No."),
            Turn("charts", self.say("describe"), sentence(f"a bar chart with {NUMBERS[len(by_height)]} bars")),
        ]
        return self._shuffled(self.rng.sample(options, self.rng.randint(2, 4)), picture)

    def photo(self) -> list[Turn]:
        if (picture := draw_photo(self.rng, self.size(), self.split.has_new_content)) is None:
            return self.shapes()
        key = self.rng.choice(("what", "describe", "describe"))
        return [Turn("photo", self.say(key), "A photo. I do not know what it shows.", (picture,))]

    def _shuffled(self, turns: list[Turn], picture: Picture) -> list[Turn]:
        self.rng.shuffle(turns)
        return [replace(turns[0], pictures=(picture,)), *turns[1:]]

    # Several pictures

    def changed(self) -> list[Turn]:
        """Twice the same scene, but for one thing."""
        before = self.scene(self.rng.randint(1, 4))
        things = list(before.things)
        if not things or len({thing.name for thing in things}) < len(things):
            return []
        thing = self.rng.choice(things)
        others = [other for other in things if other is not thing]
        known = colors_on(before.ground)
        kind = self.rng.choice(("turned", "gone", "new", "moved", "nothing", "nothing", "nothing"))
        match kind:
            case "turned":
                colors = [color for color in known if color != thing.color and self._may_be(color, thing.shape, others)]
                if not colors:
                    return []
                color = self.rng.choice(colors)
                after = [replace(other, color=color) if other is thing else other for other in things]
                answer = f"The {thing.name} turned {color}."
            case "gone":
                after, answer = others, f"The {thing.name} is gone."
            case "new":
                if len(things) < 2:
                    return []
                after, things, answer = things, others, f"There is a new {thing.name}."
            case "moved":
                elsewhere = self._elsewhere(thing, others)
                if elsewhere is None:
                    return []
                after = [elsewhere if other is thing else other for other in things]
                answer = f"The {thing.name} moved."
            case _:
                after, answer = things, "Nothing changed."
        size = self.size()
        # The grain differs: two pictures of the same are not equal to the bit.
        pictures = tuple(self.show(Scene(tuple(now), before.ground, self.rng.getrandbits(32)), size) for now in (things, after))
        is_new = kind == "nothing" or self._is_new_pair(thing)
        turns = [
            Turn("compare two", self.say("changed"), answer, is_new=is_new),
            Turn("compare two", self.say("same"), "Yes." if kind == "nothing" else "No.", is_new=is_new),
        ]
        if self.split.is_training and kind in ("gone", "new", "turned"):
            turns.append(Turn("compare two", self.say("which shows", name=article(thing.name)), nth(1 if kind == "new" else 0)))
        turns = self.rng.sample(turns, self.rng.randint(1, len(turns)))
        return [replace(turns[0], pictures=pictures), *turns[1:]]

    def _may_be(self, color: str, shape: str, others: Sequence[Thing]) -> bool:
        is_new = (color, shape) in HELD_OUT_PAIRS and not self.split.has_new_content
        return not is_new and all(other.name != f"{color} {shape}" for other in others)

    def _elsewhere(self, thing: Thing, others: Sequence[Thing]) -> Thing | None:
        for _ in range(20):
            x, y = self.rng.uniform(0.17, 0.83), self.rng.uniform(0.17, 0.83)
            moved = replace(thing, x=x, y=y)
            if max(abs(x - thing.x), abs(y - thing.y)) < 0.3 or (not self.split.has_new_content and is_at_held_out_place(moved)):
                continue
            if all(abs(x - other.x) + abs(y - other.y) > 1.6 * (thing.radius + other.radius) for other in others):
                return moved
        return None

    def several(self, count: int) -> list[Turn]:
        """Two or three different pictures, and which of them has what."""
        skill = f"compare {('two', 'three')[count - 2]}"
        scenes = [self.scene(1 if self.rng.random() < 0.5 else self.rng.randint(1, 5)) for _ in range(count)]
        if not all(scene.things for scene in scenes):
            return []
        size = self.size()
        pictures = tuple(self.show(scene, size) for scene in scenes)
        by_count = sorted(range(count), key=lambda index: len(scenes[index].things))
        turns: list[Turn] = []
        if len(scenes[by_count[-1]].things) > len(scenes[by_count[-2]].things):
            turns.append(Turn(skill, self.say("more" if count == 2 else "most"), nth(by_count[-1])))
        if count == 2 and len(scenes[by_count[0]].things) < len(scenes[by_count[1]].things):
            turns.append(Turn(skill, self.say("fewer"), nth(by_count[0])))
        index = self.rng.randrange(count)
        thing = self.rng.choice(scenes[index].things)
        turns += [
            Turn(skill, self.say("which shows", name=article(name)), nth(index), is_new=self._is_new_pair(thing))
            for name in (thing.name, thing.shape)
            if sum(any(name in (other.name, other.shape) for other in scene.things) for scene in scenes) == 1
        ]
        for index, scene in enumerate(scenes):
            ordinal = ORDINALS[index]
            if len(scene.things) == 1:
                is_new = self._is_new_pair(scene.things[0])
                turns.append(Turn(skill, self.say("shape in nth", nth=ordinal), sentence(article(scene.things[0].shape)), is_new=is_new))
                turns.append(Turn(skill, self.say("colour in nth", nth=ordinal), sentence(scene.things[0].color), is_new=is_new))
            if len(scene.things) < 3 and (answer := describe(scene)) is not None:
                turns.append(Turn(skill, self.say("what in nth", nth=ordinal), answer))
        if not turns:
            return []
        turns = self.rng.sample(turns, min(len(turns), self.rng.randint(2, 4)))
        return [replace(turns[0], pictures=pictures), *turns[1:]]

    # Videos

    def video(self) -> list[Turn]:
        drawn = draw_clip(self.rng, self.size(), self.split.has_new_content)
        if drawn is None:
            return []
        picture, clip = drawn
        turns = self._about_clip(clip)
        turns = self.rng.sample(turns, min(len(turns), self.rng.randint(1, 3)))
        return [replace(turns[0], pictures=(picture,)), *turns[1:]]

    def _about_clip(self, clip: Clip) -> list[Turn]:
        first, last = clip.things[0], clip.things[-1]
        is_new = self._is_new_pair(first)
        match clip.event:
            case "moves":
                way = clip.direction if DIRECTIONS[clip.direction][1] else f"to the {clip.direction}"
                alone = len(clip.things) == 1
                turns = [
                    Turn("video direction", self.say("direction", name=first.shape if alone else first.name), sentence(way), is_new=is_new),
                    Turn("video direction", self.say("happens"), sentence(f"the {first.name} moves {way}"), is_new=is_new),
                ]
                # Where nothing else is, what moves can be told without seeing it move.
                return turns if alone else [*turns, Turn("video what moves", self.say("moves"), sentence(f"the {first.name}"), is_new=is_new)]
            case "turns":
                return [Turn("video change", self.say(key), f"The {first.name} turns {clip.color}.") for key in ("happens", "changed")]
        names = [f"the {thing.name}" for thing in clip.things]
        return [
            Turn("video order", self.say("first"), sentence(f"the {first.name}")),
            Turn("video order", self.say("last"), sentence(f"the {last.name}")),
            Turn("video order", self.say("order"), sentence(", then ".join(names))),
            Turn("video order", self.say("happens"), sentence(f"{names[0]} appears, then {', then '.join(names[1:])}")),
        ]

    # Chinese

    def chinese(self) -> list[Turn]:
        scene = self.scene(self.rng.choice((0, 1, 1, 2, 2, 3, 4)))
        if self.rng.random() < 0.12:
            text = str(self.rng.randint(0, 999))
            picture, _ = draw_print(self.rng, self.size(), text, self.split.has_new_content)
            return [Turn("Chinese", self.say("zh number"), f"{text}。", (picture,))]
        picture = self.show(scene)
        if not scene.things:
            return [Turn("Chinese", self.say("zh describe"), "图里什么都没有。", (picture,))]
        turns = [turn for _ in range(6) if (turn := self._in_chinese(scene))]
        turns = list({turn.text: turn for turn in turns}.values())[:4]
        return [replace(turns[0], pictures=(picture,)), *turns[1:]] if turns else []

    def _in_chinese(self, scene: Scene) -> Turn | None:
        thing = self.rng.choice(scene.things)
        color, shape = CHINESE[thing.color], CHINESE[thing.shape]
        alone = len(scene.things) == 1
        match self.rng.choice(("shape", "colour", "count", "where", "exists", "describe")):
            case "shape":
                if alone:
                    return Turn("Chinese", self.say("zh shape"), f"{shape}。")
                if sum(other.color == thing.color for other in scene.things) == 1:
                    return Turn("Chinese", self.say("zh shape of", color=color), f"{shape}。")
            case "colour":
                if alone:
                    return Turn("Chinese", self.say("zh colour"), f"{color}。")
                if sum(other.shape == thing.shape for other in scene.things) == 1:
                    return Turn("Chinese", self.say("zh colour of", name=shape), f"{color}。")
            case "count":
                return Turn("Chinese", self.say("zh count"), f"{CHINESE_COUNTS[len(scene.things)]}个。")
            case "where":
                if thing.has_clear_place and sum(other.name == thing.name for other in scene.things) == 1:
                    return Turn("Chinese", self.say("zh where", name=f"{color}的{shape}"), f"在{CHINESE[thing.cell]}。")
            case "exists":
                name = thing.name if self.rng.random() < 0.5 else self._some_name()
                is_there = any(other.name == name for other in scene.things)
                color, shape = (CHINESE[word] for word in name.split())
                return Turn("Chinese", self.say("zh exists", name=f"{color}的{shape}"), "有。" if is_there else "没有。")
            case _:
                if (ordered := _in_order(scene)) is not None and len(ordered) < 4:
                    parts = (f"{CHINESE[other.cell]}有一个{CHINESE[other.color]}的{CHINESE[other.shape]}" for other in ordered)
                    return Turn("Chinese", self.say("zh describe"), "，".join(parts) + "。")
        return None

    # What no picture answers

    def talk(self) -> list[Turn]:
        """Without any picture."""
        turns = []
        for _ in range(self.rng.randint(1, 3)):
            kind = self.rng.random()
            if kind < 0.2:
                turns.append(Turn("greeting", self.rng.choice(small_talk.GREETINGS), small_talk.HELLO))
            elif kind < 0.3:
                turns.append(Turn("greeting", self.rng.choice(small_talk.WHO_QUESTIONS), small_talk.WHO))
            elif kind < 0.4:
                turns.append(Turn("greeting", self.rng.choice(small_talk.CAN_QUESTIONS), small_talk.CAN))
            elif kind < 0.55:
                key = self.rng.choice(("shape", "colour", "describe", "count", "number", "what"))
                turns.append(Turn("no picture", self.say(key), small_talk.NO_PICTURE))
            else:
                turns.append(self._unknown())
        return turns

    def _unknown(self) -> Turn:
        return Turn("unknown", small_talk.unknown_question(self.rng, self.split.has_new_phrases), small_talk.UNKNOWN)


def _is_clear(thing: Thing, scene: Scene) -> bool:
    """Whether it stands well inside its ninth, and nothing else reaches into it."""
    others = (other for other in scene.things if other is not thing)
    return thing.has_clear_place and all(other.has_clear_place and other.covers(thing.cell) <= BARELY for other in others)


def _in_order(scene: Scene) -> list[Thing] | None:
    """In reading order; None where people might disagree about it."""
    if not all(_is_clear(thing, scene) for thing in scene.things):
        return None
    return sorted(scene.things, key=lambda thing: CELLS.index(thing.cell))


def describe(scene: Scene) -> str | None:
    """One sentence; None where it could be said in two ways."""
    if not scene.things:
        return EMPTY
    if len(scene.things) > 4:
        return f"There are {NUMBERS[len(scene.things)]} shapes."
    if (ordered := _in_order(scene)) is None:
        return None
    return sentence(", ".join(f"{article(thing.name)} {place_of(thing.cell)}" for thing in ordered))


def as_json(value: object) -> str:
    return json.dumps(value)


def nth(index: int) -> str:
    return sentence(f"the {ORDINALS[index]} one")


CHINESE_COUNTS = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九")


@dataclass(frozen=True, slots=True)
class Kind:
    weight: float  # of it among training lessons
    make: Callable[[Teacher], list[Turn]]


KINDS = {
    "shapes": Kind(24, Teacher.shapes),
    "one shape": Kind(6, lambda teacher: teacher.shapes(1)),
    "relations": Kind(4, Teacher.relations),
    "crowd": Kind(8, Teacher.crowd),
    "crowd alike": Kind(9, lambda teacher: teacher.crowd(alike=1.0)),
    "blank": Kind(3, Teacher.blank),
    "follow-up": Kind(7, Teacher.follow_up),
    "next picture": Kind(3, Teacher.next_picture),
    "number": Kind(10, Teacher.number),
    "word": Kind(7, Teacher.word),
    "clothes": Kind(8, Teacher.clothes),
    "emoji": Kind(6, Teacher.emoji),
    "chart": Kind(5, Teacher.chart),
    "photo": Kind(1.5, Teacher.photo),
    "changed": Kind(18, Teacher.changed),
    "two pictures": Kind(8, lambda teacher: teacher.several(2)),
    "three pictures": Kind(5, lambda teacher: teacher.several(3)),
    "video": Kind(10, Teacher.video),
    "Chinese": Kind(7, Teacher.chinese),
    "talk": Kind(3.5, Teacher.talk),
}
