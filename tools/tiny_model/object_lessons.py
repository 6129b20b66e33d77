"""Print, clothing, emoji, charts and photos."""

from __future__ import annotations

import json

from tools.tiny_model.pictures import WORDS, draw_chart, draw_clothes, draw_emoji, draw_photo, draw_print
from tools.tiny_model.scene_lessons import shapes
from tools.tiny_model.teacher import NUMBERS, Teacher, Turn, article, sentence


def _ask_what_it_is(teacher: Teacher) -> str:
    return teacher.say(teacher.rng.choice(("describe", "what")))


def number(teacher: Teacher) -> list[Turn]:
    text = str(teacher.rng.randint(0, 9) if teacher.rng.random() < 0.25 else teacher.rng.randint(10, 999))
    picture, ink = draw_print(teacher.rng, teacher.size(), text, teacher.split.has_new_content)
    turns = [Turn("digits", teacher.say("number"), f"{text}.")]
    options = [
        Turn("colour of print", teacher.say("colour of print", name="number"), sentence(ink)),
        Turn("describe", _ask_what_it_is(teacher), f"The number {text}."),
        Turn(
            "JSON", teacher.say("as json", question=teacher.say("number")), json.dumps({"number": int(text)})
        ),
    ]
    turns += teacher.rng.sample(options, teacher.rng.randint(0, 2))
    return teacher.shuffled(turns, picture)


def word(teacher: Teacher) -> list[Turn]:
    text = teacher.rng.choice(WORDS)
    picture, ink = draw_print(teacher.rng, teacher.size(), text, teacher.split.has_new_content)
    turns = [Turn("words", teacher.say("word"), sentence(text))]
    options = [
        Turn("colour of print", teacher.say("colour of print", name="word"), sentence(ink)),
        Turn("describe", _ask_what_it_is(teacher), f"The word {text}."),
    ]
    turns += teacher.rng.sample(options, teacher.rng.randint(0, 2))
    return teacher.shuffled(turns, picture)


def clothes(teacher: Teacher) -> list[Turn]:
    if (drawn := draw_clothes(teacher.rng, teacher.size(), not teacher.split.is_training)) is None:
        return shapes(teacher)
    answer = sentence(drawn[1] if drawn[1] == "trousers" else article(drawn[1]))
    key = teacher.rng.choice(("clothes", "clothes", "what", "describe"))
    return [Turn("clothing", teacher.say(key), answer, (drawn[0],))]


def emoji(teacher: Teacher) -> list[Turn]:
    if (drawn := draw_emoji(teacher.rng, teacher.size(), teacher.split.has_new_content)) is None:
        return shapes(teacher)
    key = teacher.rng.choice(("emoji", "what", "describe"))
    answer = sentence(
        f"the {drawn[1]}"
        if drawn[1] in ("sun", "moon")
        else "fire"
        if drawn[1] == "fire"
        else article(drawn[1])
    )
    return [Turn("emoji", teacher.say(key), answer, (drawn[0],))]


def chart(teacher: Teacher) -> list[Turn]:
    picture, chart = draw_chart(teacher.rng, teacher.size())
    by_height = [color for _, color in sorted(zip(chart.heights, chart.colors, strict=True))]
    one, other = teacher.rng.sample(range(len(chart.colors)), 2)
    is_higher = chart.heights[one] > chart.heights[other]
    options = [
        Turn("charts", teacher.say("highest"), sentence(f"the {by_height[-1]} bar")),
        Turn("charts", teacher.say("lowest"), sentence(f"the {by_height[0]} bar")),
        Turn("charts", teacher.say("bars"), sentence(NUMBERS[len(by_height)])),
        Turn(
            "charts",
            teacher.say("higher", name=chart.colors[one], other=chart.colors[other]),
            "Yes." if is_higher else "No.",
        ),
        Turn(
            "charts", _ask_what_it_is(teacher), sentence(f"a bar chart with {NUMBERS[len(by_height)]} bars")
        ),
    ]
    return teacher.shuffled(teacher.rng.sample(options, teacher.rng.randint(2, 4)), picture)


def photo(teacher: Teacher) -> list[Turn]:
    if (picture := draw_photo(teacher.rng, teacher.size(), teacher.split.has_new_content)) is None:
        return shapes(teacher)
    key = teacher.rng.choice(("what", "describe", "describe"))
    return [Turn("photo", teacher.say(key), "A photo. I do not know what it shows.", (picture,))]
