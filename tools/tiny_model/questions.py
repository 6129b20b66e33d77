"""Questions about a scene and their right answers, in a few phrasings each.

`Question.skill` names what is asked, so that accuracy can be told per skill. British and American spelling both occur.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.tiny_model.scenes import CELLS, COLORS, SHAPES, Scene

REFUSAL = "I do not know. I can only talk about simple pictures of shapes, colors and numbers."
NUMBER_WORDS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True, slots=True)
class Question:
    skill: str
    text: str
    answer: str


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def where(cell: str) -> str:
    return {"center": "in the center", "left": "on the left", "right": "on the right"}.get(cell, f"at the {cell}")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def describe(scene: Scene) -> str:
    if scene.number:
        return f"The number {scene.number}."
    if not scene.things:
        return "The picture is empty."
    ordered = sorted(scene.things, key=lambda thing: CELLS.index(thing.cell))
    return sentence(", ".join(f"{article(thing.name)} {where(thing.cell)}" for thing in ordered))


def ask(scene: Scene, rng: random.Random) -> Question:
    """One random question that has exactly one right answer for this scene."""
    say = rng.choice
    colour = say(("color", "color", "colour"))
    picture = say(("picture", "image"))
    description = Question(
        "describe",
        say((f"Describe the {picture}.", "What do you see?", f"What is in the {picture}?", f"What is in this {picture}?")),
        describe(scene),
    )
    if scene.number:
        number = say(("What number is shown?", f"What number is in the {picture}?", "Which number do you see?", "Read the number."))
        ink = Question("colour", f"What {colour} is the number?", sentence(scene.ink))
        return rng.choices((Question("digits", number, f"{scene.number}."), ink, description), weights=(6, 1, 2))[0]
    options = [description, _count(scene, rng, picture), _exists(scene, rng, picture)]
    options.append(_at_cell(scene, rng))
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    for thing in scene.things:
        if len(scene.things) == 1:
            text = say(("What shape is it?", f"What shape is in the {picture}?", "What shape is this?", "Which shape do you see?"))
            options.append(Question("shape", text, sentence(article(thing.shape))))
            text = say((f"What {colour} is it?", f"What {colour} is the shape?", f"What {colour} is the {thing.shape}?"))
            options.append(Question("colour", text, sentence(thing.color)))
        if colors.count(thing.color) == 1:
            text = say((f"What shape is {thing.color}?", f"Which shape is {thing.color}?", f"What shape is the {thing.color} one?"))
            options.append(Question("shape", text, sentence(article(thing.shape))))
        if shapes.count(thing.shape) == 1:
            text = say(
                (f"What {colour} is the {thing.shape}?", f"Which {colour} is the {thing.shape}?", f"What {colour} does the {thing.shape} have?")
            )
            options.append(Question("colour", text, sentence(thing.color)))
        if [other.name for other in scene.things].count(thing.name) == 1:
            name = thing.shape if shapes.count(thing.shape) == 1 and rng.random() < 0.5 else thing.name
            text = say((f"Where is the {name}?", f"In which place is the {name}?"))
            options.append(Question("position", text, sentence(where(thing.cell))))
    weights = {"shape": 2.0, "colour": 4.0, "position": 2.0, "describe": 2.0, "count": 1.0, "exists": 1.0, "cell": 2.0}
    tally = {option.skill: sum(o.skill == option.skill for o in options) for option in options}
    return rng.choices(options, weights=[weights[o.skill] / tally[o.skill] for o in options])[0]


def _count(scene: Scene, rng: random.Random, picture: str) -> Question:
    color = rng.choice(list(COLORS))
    if scene.things and rng.random() < 0.5:
        color = rng.choice(scene.things).color
    if rng.random() < 0.3:
        number = sum(thing.color == color for thing in scene.things)
        return Question("count", f"How many {color} shapes are there?", sentence(NUMBER_WORDS[number]))
    text = rng.choice(("How many shapes are there?", f"How many shapes are in the {picture}?", "How many shapes do you see?", "Count the shapes."))
    return Question("count", text, sentence(NUMBER_WORDS[len(scene.things)]))


def _exists(scene: Scene, rng: random.Random, picture: str) -> Question:
    names = {thing.name for thing in scene.things}
    name = f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    if names and rng.random() < 0.6:
        name = rng.choice(sorted(names))
    text = rng.choice((f"Is there {article(name)}?", f"Do you see {article(name)}?", f"Is there {article(name)} in the {picture}?"))
    return Question("exists", text, "Yes." if name in names else "No.")


def _at_cell(scene: Scene, rng: random.Random) -> Question:
    cell = rng.choice(CELLS)
    if scene.things and rng.random() < 0.75:
        cell = rng.choice(scene.things).cell
    found = [thing for thing in scene.things if thing.cell == cell]
    return Question("cell", f"What is {where(cell)}?", sentence(article(found[0].name)) if found else "Nothing.")


def small_talk(rng: random.Random) -> Question:
    """A question that no picture answers: the model should say what it is for."""
    text = rng.choice(
        (
            "What is the capital of France?", "Who are you?", "Tell me a joke.", "What is the weather today?", "Write a poem.", "What can you do?",
            "What time is it?", "How old is the universe?", "Who wrote this book?", "Translate this text.", "What is the meaning of life?",
            "Who is the president?",
        )
    )  # fmt: skip
    if rng.random() < 0.35:
        return Question(
            "talk", rng.choice(("Hello", "Hi", "Hello!", "Hi there", "Good morning")), "Hello! Show me a picture with shapes or a number."
        )
    return Question("talk", text, REFUSAL)
