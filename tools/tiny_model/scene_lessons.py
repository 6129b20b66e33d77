"""Questions in English about one picture of shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from tools.tiny_model import small_talk
from tools.tiny_model.names import CELLS, COLORS, SHAPES
from tools.tiny_model.scenes import HELD_OUT_PAIRS, Scene, Thing, is_at_held_out_place, make_scene
from tools.tiny_model.teacher import (
    NUMBERS,
    Teacher,
    Turn,
    article,
    distinct,
    is_new_pair,
    place_of,
    plural,
    sentence,
    shown,
)

HELD_OUT_NAMES = tuple(sorted(" ".join(pair) for pair in HELD_OUT_PAIRS))
EMPTY = "The picture is empty."
RELATIONS = ("left of", "right of", "above", "below")
BARELY = 0.05  # a thing that covers less of a ninth of the picture is not in it


def is_clear(thing: Thing, scene: Scene) -> bool:
    """Whether it stands well inside its ninth, and nothing else reaches into it."""
    others = (other for other in scene.things if other is not thing)
    return thing.has_clear_place and all(
        other.has_clear_place and other.covers(thing.cell) <= BARELY for other in others
    )


def in_order(scene: Scene) -> list[Thing] | None:
    """In reading order; None where people might disagree about it."""
    if not all(is_clear(thing, scene) for thing in scene.things):
        return None
    return sorted(scene.things, key=lambda thing: CELLS.index(thing.cell))


def describe(scene: Scene) -> str | None:
    """One sentence; None where it could be said in two ways."""
    if not scene.things:
        return EMPTY
    if len(scene.things) > 4:
        return f"There are {NUMBERS[len(scene.things)]} shapes."
    if (ordered := in_order(scene)) is None:
        return None
    return sentence(", ".join(f"{article(thing.name)} {place_of(thing.cell)}" for thing in ordered))


def shapes(teacher: Teacher, count: int | None = None) -> list[Turn]:
    scene = teacher.scene(count)
    if not scene.things:
        return blank(teacher)
    asked = distinct(about(teacher, scene) for _ in range(teacher.rng.randint(4, 8)))
    return shown(asked, teacher.show(scene))


def crowd(teacher: Teacher, alike: float = 0.0) -> list[Turn]:
    """Many shapes: mostly counting. With `alike`, there are several of each colour and of each shape."""
    scene = teacher.scene(teacher.rng.randint(3, 9), alike)
    options = (_count_of, _count_of, _count_of, _exists, about)
    asked = distinct(
        [_count(teacher, scene), *(teacher.rng.choice(options)(teacher, scene) for _ in range(6))]
    )
    if alike:
        asked = [
            replace(turn, skill="count alike") if turn.skill.startswith("count") else turn for turn in asked
        ]
    teacher.rng.shuffle(asked)
    return shown(asked, teacher.show(scene))


def relations(teacher: Teacher) -> list[Turn]:
    """What stands left of what, mixed with where they stand.

    Among other questions alone, this one would stay at chance.
    """
    scene = teacher.scene(teacher.rng.randint(2, 4))
    turns = distinct(teacher.rng.choice((_relation, _relation, _where))(teacher, scene) for _ in range(10))
    return shown(turns, teacher.show(scene)) if turns else []


def blank(teacher: Teacher) -> list[Turn]:
    """An empty ground: whatever is asked, the model says that nothing is there."""
    name = teacher.some_name()
    color, shape = name.split()
    questions: tuple[tuple[str, dict[str, str]], ...] = (
        ("shape", {}), ("colour", {}), ("what", {}), ("describe", {}), ("describe", {}),
        ("colour of shape", {"name": shape}),
        ("where", {"name": name}), ("shape of color", {"color": color}), ("number", {}), ("word", {}),
        ("emoji", {}),
        ("at", {"where": place_of(teacher.rng.choice(CELLS))}), ("size", {"name": shape}),
    )  # fmt: skip
    turns = [
        Turn("blank", teacher.say(key, **fields), EMPTY)
        for key, fields in teacher.rng.sample(questions, teacher.rng.randint(1, 3))
    ]
    if teacher.rng.random() < 0.3:
        turns.append(Turn("count 0-5", teacher.say("count"), "Zero.", is_new=False))
    if teacher.rng.random() < 0.3:
        turns.append(
            Turn("exists", teacher.say("exists", name=article(name)), "No.", is_new=name in HELD_OUT_NAMES)
        )
    return teacher.shuffled(turns, teacher.show(make_scene(teacher.rng, 0)))


def about(teacher: Teacher, scene: Scene) -> Turn:
    """One random question about a scene that is not empty."""
    options: list[Callable[[Teacher, Scene], Turn | None]] = [
        _shape, _colour, _where, _size, _extreme, _relation, _count, _count_of, _exists,
        _absent, _at, _describe, _json, _unknown,
    ]  # fmt: skip
    weights = (3, 3, 4, 1.5, 1, 2.5, 2, 2, 1.5, 0.4, 3, 2.5, 1.5, 1.3)
    while True:
        if turn := teacher.rng.choices(options, weights)[0](teacher, scene):
            return turn


def _shape(teacher: Teacher, scene: Scene) -> Turn | None:
    return _shape_or_colour(teacher, scene, "shape", 0.7)


def _colour(teacher: Teacher, scene: Scene) -> Turn | None:
    return _shape_or_colour(teacher, scene, "colour", 0.5)


def _shape_or_colour(
    teacher: Teacher, scene: Scene, skill: Literal["shape", "colour"], plainly: float
) -> Turn | None:
    """Asks for it by the other of the two, by its place, or, of a thing that is alone, `plainly` so often."""
    thing = teacher.rng.choice(scene.things)
    if len(scene.things) == 1 and teacher.rng.random() < plainly:
        text = teacher.say(skill)
    elif is_clear(thing, scene) and teacher.rng.random() < 0.25:
        text = teacher.say(f"{skill} at", where=place_of(thing.cell))
    elif not scene.has_one(thing, "color" if skill == "shape" else "shape"):
        return None
    elif skill == "shape":
        text = teacher.say("shape of color", color=thing.color)
    else:
        text = teacher.say("colour of shape", name=thing.shape)
    answer = sentence(article(thing.shape) if skill == "shape" else thing.color)
    return Turn(skill, text, answer, is_new=is_new_pair(thing))


def _name(teacher: Teacher, thing: Thing, scene: Scene) -> str | None:
    """A name that means this thing alone."""
    if not scene.has_one(thing, "name"):
        return None
    return thing.shape if scene.has_one(thing, "shape") and teacher.rng.random() < 0.4 else thing.name


def _where(teacher: Teacher, scene: Scene) -> Turn | None:
    thing = teacher.rng.choice(scene.things)
    if not thing.has_clear_place or (name := _name(teacher, thing, scene)) is None:
        return None
    return Turn(
        "position",
        teacher.say("where", name=name),
        sentence(place_of(thing.cell)),
        is_new=is_at_held_out_place(thing),
    )


def _size(teacher: Teacher, scene: Scene) -> Turn | None:
    thing = teacher.rng.choice(scene.things)
    if not thing.size or (name := _name(teacher, thing, scene)) is None:
        return None
    return Turn("size", teacher.say("size", name=name), sentence(thing.size), is_new=is_new_pair(thing))


def _extreme(teacher: Teacher, scene: Scene) -> Turn | None:
    if len(scene.things) < 2:
        return None
    by_size = sorted(scene.things, key=lambda thing: thing.radius)
    if teacher.rng.random() < 0.5 and by_size[-1].radius > by_size[-2].radius * 1.3:
        return Turn(
            "size",
            teacher.say("largest"),
            sentence(f"the {by_size[-1].name}"),
            is_new=is_new_pair(by_size[-1]),
        )
    if by_size[0].radius * 1.3 < by_size[1].radius:
        return Turn(
            "size",
            teacher.say("smallest"),
            sentence(f"the {by_size[0].name}"),
            is_new=is_new_pair(by_size[0]),
        )
    return None


def _relation(teacher: Teacher, scene: Scene) -> Turn | None:
    if len(scene.things) < 2:
        return None
    one, other = teacher.rng.sample(scene.things, 2)
    names = _name(teacher, one, scene), _name(teacher, other, scene)
    margins = (other.x - one.x, one.x - other.x, other.y - one.y, one.y - other.y)
    relation, margin = teacher.rng.choice(list(zip(RELATIONS, margins, strict=True)))
    if names[0] is None or names[1] is None or abs(margin) < 0.2:
        return None
    text = teacher.say("relation", name=names[0], relation=relation, other=names[1])
    return Turn(
        "relation", text, "Yes." if margin > 0 else "No.", is_new=is_new_pair(one) or is_new_pair(other)
    )


def _count(teacher: Teacher, scene: Scene) -> Turn:
    return _counted(teacher, "count", len(scene.things))


def _counted(teacher: Teacher, key: str, number: int, **fields: str) -> Turn:
    return Turn(
        f"count {'0-5' if number <= 5 else '6-9'}", teacher.say(key, **fields), sentence(NUMBERS[number])
    )


def _count_of(teacher: Teacher, scene: Scene) -> Turn:
    """How many of one colour, or of one shape."""
    thing = teacher.rng.choice(scene.things)
    if teacher.rng.random() < 0.5:
        color = thing.color if teacher.rng.random() < 0.75 else teacher.rng.choice(list(COLORS))
        name, number = f"{color} shapes", sum(other.color == color for other in scene.things)
    else:
        shape = thing.shape if teacher.rng.random() < 0.75 else teacher.rng.choice(SHAPES)
        name, number = plural(shape), sum(other.shape == shape for other in scene.things)
    return _counted(teacher, "count of", number, name=name)


def _exists(teacher: Teacher, scene: Scene) -> Turn:
    thing = teacher.rng.choice(scene.things)
    # Nearly right where it is wrong, so that neither colour nor shape alone gives the answer.
    name = thing.name if teacher.rng.random() < 0.5 else teacher.some_name(thing)
    is_there = any(other.name == name for other in scene.things)
    is_new = name in HELD_OUT_NAMES
    if is_new and is_there and teacher.rng.random() < 0.6:  # or nearly all that are asked for would be there
        name = teacher.rng.choice(HELD_OUT_NAMES)
        is_there = any(other.name == name for other in scene.things)
    return Turn(
        "exists", teacher.say("exists", name=article(name)), "Yes." if is_there else "No.", is_new=is_new
    )


def _absent(teacher: Teacher, scene: Scene) -> Turn | None:
    """A question about a thing that is not there."""
    if teacher.rng.random() < 0.5:  # something like it may be there
        name = teacher.some_name(teacher.rng.choice(scene.things))
        if any(thing.name == name for thing in scene.things):
            return None
        return Turn(
            "absent", teacher.say("where", name=name), f"There is no {name}.", is_new=name in HELD_OUT_NAMES
        )
    shape = teacher.rng.choice(SHAPES)
    if any(thing.shape == shape for thing in scene.things):
        return None
    return Turn("absent", teacher.say("colour of shape", name=shape), f"There is no {shape}.", is_new=False)


def _unknown(teacher: Teacher, scene: Scene) -> Turn | None:
    """A question about a thing that is there, which the model was not taught to answer."""
    thing = teacher.rng.choice(scene.things)
    if (name := _name(teacher, thing, scene)) is None:
        return None
    words = {part: teacher.rng.choice(choices) for part, choices in small_talk.OF_THINGS.items()}
    text = teacher.say("unknown of it", name=name, shape=thing.shape, **words)
    return Turn("unknown of it", text, small_talk.UNKNOWN, is_new=is_new_pair(thing) and thing.shape in text)


def stands_at(teacher: Teacher, scene: Scene) -> tuple[str, Thing | None] | None:
    """A place, often one where something is, and what is there; None where people might disagree about it."""
    cell = teacher.rng.choice(CELLS) if teacher.rng.random() < 0.25 else teacher.rng.choice(scene.things).cell
    found = [thing for thing in scene.things if thing.cell == cell]
    if not all(is_clear(thing, scene) for thing in (found or scene.things)):
        return None
    if not found and any(thing.covers(cell) > BARELY for thing in scene.things):
        return None
    return cell, found[0] if found else None


def _at(teacher: Teacher, scene: Scene) -> Turn | None:
    if (found := stands_at(teacher, scene)) is None:
        return None
    cell, thing = found
    answer = sentence(article(thing.name)) if thing else "Nothing."
    return Turn(
        "position",
        teacher.say("at", where=place_of(cell)),
        answer,
        is_new=thing is not None and is_at_held_out_place(thing),
    )


def _describe(teacher: Teacher, scene: Scene) -> Turn | None:
    if (answer := describe(scene)) is None:
        return None
    if len(scene.things) == 1 and teacher.rng.random() < 0.4:
        return Turn("describe", teacher.say("what"), sentence(article(scene.things[0].name)))
    key = teacher.rng.choice(("describe", "describe", "what")) if len(scene.things) > 1 else "describe"
    return Turn("describe", teacher.say(key), answer)


def _json(teacher: Teacher, scene: Scene) -> Turn | None:
    ordered = in_order(scene)
    if teacher.rng.random() < 0.5 and ordered is not None and len(ordered) < 4:
        return Turn(
            "JSON",
            teacher.say("json"),
            json.dumps({"shapes": [{"color": thing.color, "shape": thing.shape} for thing in ordered]}),
        )
    for _ in range(8):
        turn = teacher.rng.choice((_shape, _colour, _count, _count_of))(teacher, scene)
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
    return Turn(
        "JSON", teacher.say("as json", question=turn.text), json.dumps({key: content}), is_new=turn.is_new
    )
