"""The basic questions in Chinese."""

from __future__ import annotations

from tools.tiny_model.names import CHINESE
from tools.tiny_model.pictures import draw_print
from tools.tiny_model.scene_lessons import in_order
from tools.tiny_model.scenes import Scene
from tools.tiny_model.teacher import Teacher, Turn, shown

NUMBERS = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九")


def chinese(teacher: Teacher) -> list[Turn]:
    scene = teacher.scene(teacher.rng.choice((0, 1, 1, 2, 2, 3, 4)))
    if teacher.rng.random() < 0.12:
        text = str(teacher.rng.randint(0, 999))
        picture, _ = draw_print(teacher.rng, teacher.size(), text, teacher.split.has_new_content)
        return [Turn("Chinese", teacher.say("zh number"), f"{text}。", (picture,))]
    picture = teacher.show(scene)
    if not scene.things:
        return [Turn("Chinese", teacher.say("zh describe"), "图里什么都没有。", (picture,))]
    turns = [turn for _ in range(6) if (turn := _in_chinese(teacher, scene))]
    turns = list({turn.text: turn for turn in turns}.values())[:4]
    return shown(turns, picture) if turns else []


def _in_chinese(teacher: Teacher, scene: Scene) -> Turn | None:
    thing = teacher.rng.choice(scene.things)
    color, shape = CHINESE[thing.color], CHINESE[thing.shape]
    alone = len(scene.things) == 1
    match teacher.rng.choice(("shape", "colour", "count", "where", "exists", "describe")):
        case "shape":
            if alone:
                return Turn("Chinese", teacher.say("zh shape"), f"{shape}。")
            if sum(other.color == thing.color for other in scene.things) == 1:
                return Turn("Chinese", teacher.say("zh shape of", color=color), f"{shape}。")
        case "colour":
            if alone:
                return Turn("Chinese", teacher.say("zh colour"), f"{color}。")
            if sum(other.shape == thing.shape for other in scene.things) == 1:
                return Turn("Chinese", teacher.say("zh colour of", name=shape), f"{color}。")
        case "count":
            return Turn("Chinese", teacher.say("zh count"), f"{NUMBERS[len(scene.things)]}个。")
        case "where":
            if thing.has_clear_place and sum(other.name == thing.name for other in scene.things) == 1:
                return Turn("Chinese", teacher.say("zh where", name=f"{color}的{shape}"), f"在{CHINESE[thing.cell]}。")
        case "exists":
            name = thing.name if teacher.rng.random() < 0.5 else teacher.some_name()
            is_there = any(other.name == name for other in scene.things)
            color, shape = (CHINESE[word] for word in name.split())
            return Turn("Chinese", teacher.say("zh exists", name=f"{color}的{shape}"), "有。" if is_there else "没有。")
        case _:
            if (ordered := in_order(scene)) is not None and len(ordered) < 4:
                parts = (f"{CHINESE[other.cell]}有一个{CHINESE[other.color]}的{CHINESE[other.shape]}" for other in ordered)
                return Turn("Chinese", teacher.say("zh describe"), "，".join(parts) + "。")
    return None
