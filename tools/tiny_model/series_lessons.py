"""What goes on: turns that refer to those before them, several pictures, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tools.tiny_model.names import DIRECTIONS
from tools.tiny_model.pictures import Clip, draw_clip
from tools.tiny_model.scene_lessons import describe, is_clear
from tools.tiny_model.scenes import HELD_OUT_PAIRS, Scene, Thing, colors_on, is_at_held_out_place
from tools.tiny_model.teacher import (
    NUMBERS,
    ORDINALS,
    Teacher,
    Turn,
    article,
    is_new_pair,
    nth,
    place_of,
    sentence,
    shown,
)


def follow_up(teacher: Teacher) -> list[Turn]:
    """Two things; a question about one, then about "the other one", or about the same one as "it"."""
    scene = teacher.scene(2)
    if (
        len(scene.things) < 2
        or scene.things[0].shape == scene.things[1].shape
        or scene.things[0].color == scene.things[1].color
    ):
        return []
    one, other = teacher.rng.sample(scene.things, 2)
    clear = all(is_clear(thing, scene) for thing in (one, other))
    asks = teacher.rng.choice(("colour", "shape", "where", "at") if clear else ("colour", "shape"))
    texts = {
        "colour": lambda thing: (teacher.say("colour of shape", name=thing.shape), sentence(thing.color)),
        "shape": lambda thing: (
            teacher.say("shape of color", color=thing.color),
            sentence(article(thing.shape)),
        ),
        "where": lambda thing: (teacher.say("where", name=thing.name), sentence(place_of(thing.cell))),
        "at": lambda thing: (teacher.say("at", where=place_of(thing.cell)), sentence(article(thing.name))),
    }
    skills = {"colour": "colour", "shape": "shape", "where": "position", "at": "position"}
    text, answer = texts[asks](one)
    turns = [Turn(skills[asks], text, answer, (teacher.show(scene),), is_new_pair(one))]
    kind = teacher.rng.random()
    if kind < 0.6:
        turns.append(Turn("follow-up", teacher.say("other"), texts[asks](other)[1]))
        last = other
    elif kind < 0.75:
        names = {
            "colour": other.shape,
            "shape": f"{other.color} one",
            "where": other.name,
            "at": f"one {place_of(other.cell)}",
        }
        turns.append(
            Turn(
                "follow-up",
                teacher.say("and name", name=names[asks]),
                texts[asks](other)[1],
                is_new=is_new_pair(other),
            )
        )
        last = other
    else:
        last = one
    more = [("colour it", sentence(last.color))] if asks in ("shape", "where") and kind > 0.3 else []
    more += [("shape it", sentence(article(last.shape)))] if asks == "colour" else []
    more += [("where it", sentence(place_of(last.cell)))] if asks in ("colour", "shape") and clear else []
    teacher.rng.shuffle(more)
    turns += [
        Turn("follow-up", teacher.say(key), answer)
        for key, answer in more[: teacher.rng.randint(0 if len(turns) > 1 else 1, 2)]
    ]
    return turns if len(turns) > 1 else []


def next_picture(teacher: Teacher) -> list[Turn]:
    """One thing a picture; a second picture comes in a later turn: "And this one?"."""
    asks = teacher.rng.choice(("shape", "colour", "what"))
    turns = []
    for index in range(teacher.rng.randint(2, 3)):
        scene = teacher.scene(1)
        thing = scene.things[0]
        answer = {"shape": article(thing.shape), "colour": thing.color, "what": article(thing.name)}[asks]
        text = teacher.say(asks) if index == 0 else teacher.say("this one")
        turns.append(
            Turn(
                "follow-up" if index else {"what": "describe"}.get(asks, asks),
                text,
                sentence(answer),
                (teacher.show(scene),),
            )
        )
    return turns


def changed(teacher: Teacher) -> list[Turn]:
    """Twice the same scene, but for one thing."""
    before = teacher.scene(teacher.rng.randint(1, 4))
    things = list(before.things)
    if not things or len({thing.name for thing in things}) < len(things):
        return []
    thing = teacher.rng.choice(things)
    others = [other for other in things if other is not thing]
    known = colors_on(before.ground)
    kind = teacher.rng.choice(("turned", "gone", "new", "moved", "nothing", "nothing", "nothing"))
    match kind:
        case "turned":
            colors = [
                color
                for color in known
                if color != thing.color and _may_be(teacher, color, thing.shape, others)
            ]
            if not colors:
                return []
            color = teacher.rng.choice(colors)
            after = [replace(other, color=color) if other is thing else other for other in things]
            answer = f"The {thing.name} turned {color}."
        case "gone":
            after, answer = others, f"The {thing.name} is gone."
        case "new":
            if len(things) < 2:
                return []
            after, things, answer = things, others, f"There is a new {thing.name}."
        case "moved":
            elsewhere = _elsewhere(teacher, thing, others)
            if elsewhere is None:
                return []
            after = [elsewhere if other is thing else other for other in things]
            answer = f"The {thing.name} moved."
        case _:
            after, answer = things, "Nothing changed."
    size = teacher.size()
    # The grain differs: two pictures of the same are not equal to the bit.
    pictures = tuple(
        teacher.show(Scene(tuple(now), before.ground, teacher.rng.getrandbits(32)), size)
        for now in (things, after)
    )
    is_new = kind == "nothing" or is_new_pair(thing)
    turns = [
        Turn("compare two", teacher.say("changed"), answer, is_new=is_new),
        Turn("compare two", teacher.say("same"), "Yes." if kind == "nothing" else "No.", is_new=is_new),
    ]
    if teacher.split.is_training and kind in ("gone", "new", "turned"):
        turns.append(
            Turn(
                "compare two",
                teacher.say("which shows", name=article(thing.name)),
                nth(1 if kind == "new" else 0),
            )
        )
    turns = teacher.rng.sample(turns, teacher.rng.randint(1, len(turns)))
    return shown(turns, *pictures)


def _may_be(teacher: Teacher, color: str, shape: str, others: Sequence[Thing]) -> bool:
    is_new = (color, shape) in HELD_OUT_PAIRS and not teacher.split.has_new_content
    return not is_new and all(other.name != f"{color} {shape}" for other in others)


def _elsewhere(teacher: Teacher, thing: Thing, others: Sequence[Thing]) -> Thing | None:
    for _ in range(20):
        x, y = teacher.rng.uniform(0.17, 0.83), teacher.rng.uniform(0.17, 0.83)
        moved = replace(thing, x=x, y=y)
        if max(abs(x - thing.x), abs(y - thing.y)) < 0.3 or (
            not teacher.split.has_new_content and is_at_held_out_place(moved)
        ):
            continue
        if all(abs(x - other.x) + abs(y - other.y) > 1.6 * (thing.radius + other.radius) for other in others):
            return moved
    return None


def several(teacher: Teacher, count: int) -> list[Turn]:
    """Two or three different pictures, and which of them has what."""
    skill = f"compare {NUMBERS[count]}"
    scenes = [
        teacher.scene(1 if teacher.rng.random() < 0.5 else teacher.rng.randint(1, 5)) for _ in range(count)
    ]
    if not all(scene.things for scene in scenes):
        return []
    size = teacher.size()
    pictures = tuple(teacher.show(scene, size) for scene in scenes)
    by_count = sorted(range(count), key=lambda index: len(scenes[index].things))
    turns: list[Turn] = []
    if len(scenes[by_count[-1]].things) > len(scenes[by_count[-2]].things):
        turns.append(Turn(skill, teacher.say("more" if count == 2 else "most"), nth(by_count[-1])))
    if count == 2 and len(scenes[by_count[0]].things) < len(scenes[by_count[1]].things):
        turns.append(Turn(skill, teacher.say("fewer"), nth(by_count[0])))
    index = teacher.rng.randrange(count)
    thing = teacher.rng.choice(scenes[index].things)
    turns += [
        Turn(skill, teacher.say("which shows", name=article(name)), nth(index), is_new=is_new_pair(thing))
        for name in (thing.name, thing.shape)
        if sum(any(name in (other.name, other.shape) for other in scene.things) for scene in scenes) == 1
    ]
    for index, scene in enumerate(scenes):
        ordinal = ORDINALS[index]
        if len(scene.things) == 1:
            is_new = is_new_pair(scene.things[0])
            turns.append(
                Turn(
                    skill,
                    teacher.say("shape in nth", nth=ordinal),
                    sentence(article(scene.things[0].shape)),
                    is_new=is_new,
                )
            )
            turns.append(
                Turn(
                    skill,
                    teacher.say("colour in nth", nth=ordinal),
                    sentence(scene.things[0].color),
                    is_new=is_new,
                )
            )
        if len(scene.things) < 3 and (answer := describe(scene)) is not None:
            turns.append(Turn(skill, teacher.say("what in nth", nth=ordinal), answer))
    if not turns:
        return []
    turns = teacher.rng.sample(turns, min(len(turns), teacher.rng.randint(2, 4)))
    return shown(turns, *pictures)


def video(teacher: Teacher) -> list[Turn]:
    drawn = draw_clip(teacher.rng, teacher.size(), teacher.split.has_new_content)
    if drawn is None:
        return []
    picture, clip = drawn
    turns = _about_clip(teacher, clip)
    turns = teacher.rng.sample(turns, min(len(turns), teacher.rng.randint(1, 3)))
    return shown(turns, picture)


def _about_clip(teacher: Teacher, clip: Clip) -> list[Turn]:
    first, last = clip.things[0], clip.things[-1]
    is_new = is_new_pair(first)
    match clip.event:
        case "moves":
            way = clip.direction if DIRECTIONS[clip.direction][1] else f"to the {clip.direction}"
            alone = len(clip.things) == 1
            turns = [
                Turn(
                    "video direction",
                    teacher.say("direction", name=first.shape if alone else first.name),
                    sentence(way),
                    is_new=is_new,
                ),
                Turn(
                    "video direction",
                    teacher.say("happens"),
                    sentence(f"the {first.name} moves {way}"),
                    is_new=is_new,
                ),
            ]
            # Where nothing else is, what moves can be told without seeing it move.
            return (
                turns
                if alone
                else [
                    *turns,
                    Turn(
                        "video what moves", teacher.say("moves"), sentence(f"the {first.name}"), is_new=is_new
                    ),
                ]
            )
        case "turns":
            return [
                Turn("video change", teacher.say(key), f"The {first.name} turns {clip.color}.")
                for key in ("happens", "changed in video")
            ]
    names = [f"the {thing.name}" for thing in clip.things]
    return [
        Turn("video order", teacher.say("first"), sentence(f"the {first.name}")),
        Turn("video order", teacher.say("last"), sentence(f"the {last.name}")),
        Turn("video order", teacher.say("order"), sentence(", then ".join(names))),
        Turn(
            "video order",
            teacher.say("happens"),
            sentence(f"{names[0]} appears, then {', then '.join(names[1:])}"),
        ),
    ]
