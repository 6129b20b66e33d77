"""Chats on which greedy tokens must be Hugging Face's in every family: small, and each of another kind."""

from __future__ import annotations

from tests.chats import CHATS, ChatTurns, Clip, FrameList
from tests.pictures import noise, scene
from tests.videos import counting_frames, encode_video

TWICE = scene(20, (112, 84))
CLIP_24 = Clip(encode_video(counting_frames(36, (112, 84)), 24.0), fps=4.0)
# 5 frames for Qwen3-VL, which takes an odd number of them; 4 for Qwen2-VL.
CLIP_ODD = Clip(encode_video(counting_frames(25, (84, 112)), 10.0), fps=2.0)
# 16 frames a second are seen, so that several frames share a position in time in Qwen2.5-VL.
CLIP_FAST = Clip(encode_video(counting_frames(20, (70, 56)), 30.0), fps=16.0)
# Time gets further than the sides of a frame; for Qwen3-VL its frames are too large together.
LONG = Clip(encode_video(counting_frames(40, (96, 72)), 4.0), fps=2.0)
SLOW = FrameList(tuple(scene(number, (84, 84)) for number in range(30, 34)), fps=0.5)
STAMPED = FrameList(
    tuple(scene(number, (84, 112)) for number in range(40, 45)), timestamps=(0.0, 0.4, 1.7, 3.0, 9.25)
)
UNTIMED = tuple(scene(number, (112, 84)) for number in range(50, 53))

FAMILY_CHATS: dict[str, ChatTurns] = {
    "text only": CHATS["text only"],
    "system and text": CHATS["system and text"],
    "one picture": CHATS["one picture"],
    "three pictures": CHATS["three pictures between texts"],
    "six pictures": [
        ("user", [*(scene(number, (56 + 14 * number, 84)) for number in range(6)), "Which differ?"])
    ],
    "a picture twice": [("user", [TWICE, "and", noise(21, (60, 60)), "and", TWICE, "Which are the same?"])],
    # Grids of 3 · 5 and of 7 · 1 tokens and the like: windows are 2 · 2.
    "sides no multiple of the window": [
        ("user", [noise(22, (140, 84)), noise(23, (28, 196)), noise(24, (252, 140)), "What is it?"])
    ],
    "sides in a ratio of 150": [("user", [noise(25, (3000, 20)), "and", noise(26, (14, 2100)), "Why?"])],
    "two turns": CHATS["pictures in two turns"],
    "a video": [("user", [CLIP_24, "What happens?"])],
    "two videos": [("user", ["First", CLIP_ODD, "then", CLIP_FAST, "Which is longer?"])],
    "a long video": [("user", [LONG, "How does it end?"])],
    "frames at a slow rate": [("user", [SLOW, "What changes?"])],
    "frames with times": [("user", ["See", STAMPED, "When was it?"])],
    "frames without times, an odd number": [("user", [UNTIMED, "Which was first?"])],
    "pictures and videos mixed": [
        ("system", ["Answer in a few words."]),
        ("user", [scene(27, (84, 84)), CLIP_ODD, "and", scene(28, (140, 84)), "What happens?"]),
        ("assistant", ["A ball rolls."]),
        ("user", [UNTIMED, "And here?", scene(29, (56, 56))]),
    ],
}
