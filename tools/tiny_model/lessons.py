"""All kinds of lessons: conversations about pictures with their right answers, which the model learns from
and is examined on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.tiny_model import small_talk
from tools.tiny_model.chinese_lessons import chinese
from tools.tiny_model.names import CELLS, CHINESE, in_chinese
from tools.tiny_model.object_lessons import chart, clothes, emoji, number, photo, word
from tools.tiny_model.phrases import PHRASES
from tools.tiny_model.scene_lessons import RELATIONS, blank, crowd, relations, shapes
from tools.tiny_model.series_lessons import changed, follow_up, next_picture, several, video
from tools.tiny_model.teacher import ORDINALS, Lesson, Teacher, Turn, article, place_of, plural

SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in a few words.",
    "You answer questions about pictures.",
    "You are a vision model.",
    "Be brief.",
)
# a frame for other questions, and what no picture would answer
NOT_OF_A_PICTURE = ("as json", "unknown of it", "zh unknown")


def make_lesson(teacher: Teacher, kind: str) -> Lesson:
    """A lesson of one of KINDS."""
    rng = teacher.rng
    turns: list[Turn] = []
    while not turns:
        turns = KINDS[kind].make(teacher)
    if rng.random() < 0.12 and kind != "talk":
        # there, "it" means what the turn before it was about
        is_chained = kind in ("follow-up", "next picture")
        turns.insert(len(turns) if is_chained else rng.randint(1, len(turns)), unknown(teacher))
    return Lesson(tuple(turns), rng.choice(SYSTEMS) if rng.random() < 0.3 else "", rng.random() < 0.25)


def talk(teacher: Teacher) -> list[Turn]:
    """Without any picture."""
    turns = []
    for _ in range(teacher.rng.randint(1, 3)):
        kind = teacher.rng.random()
        if kind < 0.05:
            turns.append(
                Turn("greeting", teacher.rng.choice(small_talk.CHINESE_GREETINGS), small_talk.CHINESE_HELLO)
            )
        elif kind < 0.2:
            turns.append(Turn("greeting", teacher.rng.choice(small_talk.GREETINGS), small_talk.HELLO))
        elif kind < 0.3:
            turns.append(Turn("greeting", teacher.rng.choice(small_talk.WHO_QUESTIONS), small_talk.WHO))
        elif kind < 0.4:
            turns.append(Turn("greeting", teacher.rng.choice(small_talk.CAN_QUESTIONS), small_talk.CAN))
        elif kind < 0.7:
            turns.append(without_picture(teacher))
        elif kind < 0.75:
            turns.append(unknown_in_chinese(teacher))
        else:
            turns.append(unknown(teacher))
    return turns


def without_picture(teacher: Teacher) -> Turn:
    """Any question about a picture, where there is none."""
    key = teacher.rng.choice([key for key in PHRASES if key not in NOT_OF_A_PICTURE])
    one, other = teacher.some_name(), teacher.some_name()
    color, shape = one.split()
    where = teacher.rng.choice(CELLS)
    if key.startswith("zh "):
        name = CHINESE[shape] if key == "zh colour of" else in_chinese(one)
        fields = {"name": name, "color": CHINESE[color], "where": CHINESE[where]}
        return Turn("no picture", teacher.say(key, **fields), small_talk.CHINESE_NO_PICTURE)
    match key:
        case "exists" | "which shows":
            one = article(one)
        case "count of":
            one = plural(shape)
        case "colour of shape":
            one = shape
        case "higher":
            one, other = color, other.split()[0]
    fields = {
        "name": one,
        "other": other,
        "color": color,
        "where": place_of(where),
        "relation": teacher.rng.choice(RELATIONS),
    }
    return Turn(
        "no picture", teacher.say(key, **fields, nth=teacher.rng.choice(ORDINALS)), small_talk.NO_PICTURE
    )


def unknown(teacher: Teacher) -> Turn:
    return Turn(
        "unknown", small_talk.unknown_question(teacher.rng, teacher.split.has_new_phrases), small_talk.UNKNOWN
    )


def unknown_in_chinese(teacher: Teacher) -> Turn:
    """In a wording that names no thing: there is none."""
    while "@" in (text := teacher.say("zh unknown", name="@")):
        pass
    return Turn("unknown", text, small_talk.CHINESE_UNKNOWN)


@dataclass(frozen=True, slots=True)
class Kind:
    weight: float  # of it among training lessons
    make: Callable[[Teacher], list[Turn]]


KINDS = {
    "shapes": Kind(24, shapes),
    "one shape": Kind(6, lambda teacher: shapes(teacher, 1)),
    "relations": Kind(4, relations),
    "crowd": Kind(8, crowd),
    "crowd alike": Kind(9, lambda teacher: crowd(teacher, alike=1.0)),
    "blank": Kind(3, blank),
    "follow-up": Kind(7, follow_up),
    "next picture": Kind(3, next_picture),
    "number": Kind(10, number),
    "word": Kind(10, word),
    "clothes": Kind(13, clothes),
    "emoji": Kind(6, emoji),
    "chart": Kind(5, chart),
    "photo": Kind(1.5, photo),
    "changed": Kind(18, changed),
    "two pictures": Kind(8, lambda teacher: several(teacher, 2)),
    "three pictures": Kind(5, lambda teacher: several(teacher, 3)),
    "video": Kind(10, video),
    "Chinese": Kind(9, chinese),
    "talk": Kind(6, talk),
}
