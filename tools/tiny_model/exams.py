"""What the model is examined on: per skill, lessons that end with a question of that skill.

Seeded: everybody is asked the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from tools.tiny_model import assets
from tools.tiny_model.lessons import make_lesson
from tools.tiny_model.teacher import NEW_CONTENT, NEW_PHRASES, NEW_SCENES, Lesson, Split, Teacher

SPLITS = {"new scenes": NEW_SCENES, "new content": NEW_CONTENT, "new wordings": NEW_PHRASES}
# Each skill with the kinds of lessons that ask for it.
SKILLS: dict[str, Sequence[str]] = {
    "shape": ("shapes", "one shape"),
    "colour": ("shapes", "one shape"),
    "position": ("shapes",),
    "size": ("shapes",),
    "relation": ("shapes",),
    "count 0-5": ("crowd", "shapes", "blank"),
    "count 6-9": ("crowd",),
    "count alike": ("crowd alike",),
    "exists": ("shapes", "crowd"),
    "absent": ("shapes",),
    "blank": ("blank",),
    "describe": ("shapes", "one shape"),
    "digits": ("number",),
    "words": ("word",),
    "colour of print": ("number", "word"),
    "clothing": ("clothes",),
    "emoji": ("emoji",),
    "charts": ("chart",),
    "photo": ("photo",),
    "follow-up": ("follow-up", "next picture"),
    "compare two": ("changed", "two pictures"),
    "compare three": ("three pictures",),
    "video direction": ("video",),
    "video what moves": ("video",),
    "video order": ("video",),
    "video change": ("video",),
    "JSON": ("shapes", "number"),
    "Chinese": ("Chinese",),
    "unknown": ("talk", "shapes"),
    "unknown of it": ("shapes", "one shape"),
    "greeting": ("talk",),
    "no picture": ("talk",),
}
# nothing in them can be held out but wordings
SAME_CONTENT = ("clothing", "unknown", "greeting", "no picture", "blank", "charts")
FIXED_WORDINGS = ("greeting",)
# kinds of lessons with pictures of what assets.py finds
FROM_ASSETS = ("number", "word", "clothes", "emoji", "photo", "Chinese")


class Exam(NamedTuple):
    skill: str
    split: str
    lesson: Lesson  # its last turn is the question; those before it are history


def exams(skills: Sequence[str], count: int) -> list[Exam]:
    """`count` for each skill and each split that holds something out for it.

    Without the packages of `assets.py` some are left out.
    """
    return [
        Exam(skill, name, lesson)
        for skill in skills
        for name, split in SPLITS.items()
        if _can_be_asked(skill, split)
        for lesson in _lessons(skill, name, split, count)
    ]


def needs_assets(skill: str) -> bool:
    return not set(SKILLS[skill]).isdisjoint(FROM_ASSETS)


def _can_be_asked(skill: str, split: Split) -> bool:
    if (split.has_new_content and skill in SAME_CONTENT) or (
        split.has_new_phrases and skill in FIXED_WORDINGS
    ):
        return False
    match skill:
        case "clothing":
            return assets.clothes(test=True) is not None
        case "emoji":
            return assets.emoji("cat") is not None
        case "photo":
            return bool(assets.photos(split.has_new_content))
        case "digits" | "words" | "colour of print" | "JSON" | "Chinese":
            return bool(assets.fonts(split.has_new_content))
        case _:
            return True


def _lessons(skill: str, name: str, split: Split, count: int) -> list[Lesson]:
    rng = random.Random(f"exam {skill} {name}")
    teacher = Teacher(rng, split)
    found: list[Lesson] = []
    while len(found) < count:
        lesson = make_lesson(teacher, rng.choice(SKILLS[skill]))
        for index, turn in enumerate(lesson.turns):
            if turn.skill == skill and (turn.is_new or not split.has_new_content):
                found.append(replace(lesson, turns=lesson.turns[: index + 1]))
                break
    return found
