"""The basic questions in Chinese."""

from __future__ import annotations

from tools.tiny_model.names import CHINESE
from tools.tiny_model.pictures import draw_print
from tools.tiny_model.scene_lessons import HELD_OUT_NAMES, in_order
from tools.tiny_model.scenes import Scene, is_at_held_out_place
from tools.tiny_model.teacher import Teacher, Turn, distinct, is_new_pair, shown

NUMBERS = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九")


def chinese(teacher: Teacher) -> list[Turn]:
    scene = teacher.scene(teacher.rng.choice((0, 1, 1, 2, 2, 3, 4)))
    if teacher.rng.random() < 0.12:
        text = str(teacher.rng.randint(0, 999))
        picture, _ = draw_print(teacher.rng, teacher.size(), text, teacher.split.has_new_content)
        return [Turn("Chinese", teacher.say("zh number"), f"{text}。", (picture,))]
    picture = teacher.show(scene)
    if not scene.things:
        return [Turn("Chinese", teacher.say("zh describe"), "图里什么都没有。", (picture,), is_new=False)]
    turns = distinct(_in_chinese(teacher, scene) for _ in range(6))[:4]
    return shown(turns, picture) if turns else []


def _in_chinese(teacher: Teacher, scene: Scene) -> Turn | None:
    thing = teacher.rng.choice(scene.things)
    color, shape = CHINESE[thing.color], CHINESE[thing.shape]
    alone, is_new = len(scene.things) == 1, is_new_pair(thing)

    def turn(key: str, answer: str, is_new: bool, **fields: str) -> Turn:
        return Turn("Chinese", teacher.say(f"zh {key}", **fields), f"{answer}。", is_new=is_new)

    match teacher.rng.choice(("shape", "colour", "count", "where", "exists", "describe")):
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
                return turn("where", f"在{CHINESE[thing.cell]}", is_at_held_out_place(thing), name=f"{color}的{shape}")
        case "exists":
            name = thing.name if teacher.rng.random() < 0.5 else teacher.some_name()
            is_there = any(other.name == name for other in scene.things)
            color, shape = (CHINESE[word] for word in name.split())
            return turn("exists", "有" if is_there else "没有", name in HELD_OUT_NAMES, name=f"{color}的{shape}")
        case _:
            if (ordered := in_order(scene)) is not None and len(ordered) < 4:
                parts = (f"{CHINESE[other.cell]}有一个{CHINESE[other.color]}的{CHINESE[other.shape]}" for other in ordered)
                return turn("describe", "，".join(parts), True)
    return None
