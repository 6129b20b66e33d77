"""The basic questions in Chinese."""

from __future__ import annotations

from tools.tiny_model.names import CELLS, CHINESE, in_chinese
from tools.tiny_model.pictures import draw_print
from tools.tiny_model.scene_lessons import HELD_OUT_NAMES, in_order, stands_at
from tools.tiny_model.scenes import Scene, is_at_held_out_place
from tools.tiny_model.small_talk import CHINESE_UNKNOWN
from tools.tiny_model.teacher import Teacher, Turn, distinct, is_new_pair, shown

NUMBERS = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九")


def chinese(teacher: Teacher) -> list[Turn]:
    scene = teacher.scene(teacher.rng.choice((0, 1, 1, 1, 2, 2, 2, 3, 4, teacher.rng.randint(5, 9))))
    if teacher.rng.random() < 0.12:
        text = str(teacher.rng.randint(0, 999))
        picture, _ = draw_print(teacher.rng, teacher.size(), text, teacher.split.has_new_content)
        return [Turn("Chinese", teacher.say("zh number"), f"{text}。", (picture,))]
    picture = teacher.show(scene)
    turns = distinct(about(teacher, scene) if scene.things else _of_nothing(teacher) for _ in range(6))[:4]
    return shown(turns, picture) if turns else []


def _of_nothing(teacher: Teacher) -> Turn:
    """A question about an empty ground."""
    key = teacher.rng.choice(
        (
            "shape",
            "colour",
            "count",
            "where",
            "exists",
            "describe",
            "describe",
            "at",
            "size",
            "shape of",
            "colour of",
        )
    )
    name = teacher.some_name()
    color, shape = (CHINESE[word] for word in name.split())
    called = shape if key == "colour of" else in_chinese(name)
    text = teacher.say(f"zh {key}", name=called, color=color, where=CHINESE[teacher.rng.choice(CELLS)])
    return Turn(
        "Chinese", text, {"count": "零个。", "exists": "没有。"}.get(key, "图里什么都没有。"), is_new=False
    )


def about(teacher: Teacher, scene: Scene) -> Turn | None:
    """One random question about a scene that is not empty; None when what was drawn cannot be asked of it."""
    thing = teacher.rng.choice(scene.things)
    color, shape = CHINESE[thing.color], CHINESE[thing.shape]
    alone, is_new = len(scene.things) == 1, is_new_pair(thing)

    def turn(key: str, answer: str, is_new: bool, **fields: str) -> Turn:
        return Turn("Chinese", teacher.say(f"zh {key}", **fields), f"{answer}。", is_new=is_new)

    match teacher.rng.choice(
        ("shape", "colour", "count", "where", "exists", "describe", "at", "size", "unknown")
    ):
        case "shape":
            if alone:
                return turn("shape", shape, is_new)
            if scene.has_one(thing, "color"):
                return turn("shape of", shape, is_new, color=color)
        case "colour":
            if alone:
                return turn("colour", color, is_new)
            if scene.has_one(thing, "shape"):
                return turn("colour of", color, is_new, name=shape)
        case "count":
            return turn("count", f"{NUMBERS[len(scene.things)]}个", True)
        case "where":
            if thing.has_clear_place and scene.has_one(thing, "name"):
                return turn(
                    "where",
                    f"在{CHINESE[thing.cell]}",
                    is_at_held_out_place(thing),
                    name=in_chinese(thing.name),
                )
        case "exists":
            name = thing.name if teacher.rng.random() < 0.5 else teacher.some_name()
            is_there = any(other.name == name for other in scene.things)
            return turn("exists", "有" if is_there else "没有", name in HELD_OUT_NAMES, name=in_chinese(name))
        case "at":
            if found := stands_at(teacher, scene):
                cell, there = found
                answer = in_chinese(there.name) if there else "什么都没有"
                return turn(
                    "at", answer, there is not None and is_at_held_out_place(there), where=CHINESE[cell]
                )
        case "size":
            if thing.size and scene.has_one(thing, "name"):
                return turn(
                    "size",
                    {"small": "小的", "large": "大的"}[thing.size],
                    is_new,
                    name=in_chinese(thing.name),
                )
        case "unknown":
            if scene.has_one(thing, "name"):
                text = teacher.say("zh unknown", name=in_chinese(thing.name))
                return Turn("Chinese", text, CHINESE_UNKNOWN, is_new=is_new and shape in text)
        case _:
            if (ordered := in_order(scene)) is not None and len(ordered) < 4:
                parts = (f"{CHINESE[other.cell]}有一个{in_chinese(other.name)}" for other in ordered)
                return turn("describe", "，".join(parts), True)
    return None
