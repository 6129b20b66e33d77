"""The chats on which greedy tokens must be Hugging Face's, and their form for the pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from pipeline.client.client import PipelineClient
from pipeline.wire.prompts import ChatMessage, ImagePart, Part, TextPart, VideoPart
from pipeline.wire.sampling import SamplingParams
from tests.pictures import encode, noise, scene


class Clip(NamedTuple):
    """A video in a chat, and how many frames a second of it are seen."""

    data: bytes
    fps: float


class FrameList(NamedTuple):
    """A video as a list of pictures that says when they were taken: so many a second, or each of them."""

    frames: tuple[Image.Image, ...]
    fps: float | None = None
    timestamps: tuple[float, ...] | None = None  # in seconds


Video = Clip | FrameList | tuple[Image.Image, ...]
Piece = str | Image.Image | Video
ChatTurns = Sequence[tuple[str, Sequence[Piece]]]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

CHATS: dict[str, ChatTurns] = {
    "text only": [("user", ["What is the capital of France?"])],
    "system and text": [
        ("system", ["Answer in a few words."]),
        ("user", ["Hello"]),
        ("assistant", ["Hi!"]),
        ("user", ["Who are you?"]),
    ],
    "one picture": [("user", [scene(1), "What is in this picture?"])],
    "three pictures between texts": [
        ("user", ["First", scene(2), "then", scene(3, (140, 112)), "and", scene(4), "What changed?"])
    ],
    "very different sizes": [
        (
            "user",
            [noise(5, (28, 28)), "or", noise(6, (500, 60)), "or", scene(7, (300, 420)), "Which is largest?"],
        )
    ],
    "pictures in two turns": [
        ("user", [scene(8), "What is it?"]),
        ("assistant", ["A red circle."]),
        ("user", ["And this one?", scene(9, (224, 168))]),
    ],
}


def to_messages(chat: ChatTurns) -> tuple[list[ChatMessage], list[bytes]]:
    """The messages, and the media's bytes as frames."""
    frames: list[bytes] = []

    def add(data: bytes) -> int:
        frames.append(data)
        return len(frames) - 1

    def to_part(piece: Piece) -> Part:
        match piece:
            case str():
                return TextPart(piece)
            case Clip():
                return VideoPart(frame=add(piece.data), fps=piece.fps)
            case FrameList(pictures, fps, timestamps):
                listed = tuple(ImagePart(frame=add(encode(frame))) for frame in pictures)
                return VideoPart(frames=listed, fps=fps, timestamps=timestamps)
            case tuple():
                return VideoPart(frames=tuple(ImagePart(frame=add(encode(frame))) for frame in piece))
            case _:
                return ImagePart(frame=add(encode(piece)))

    return [ChatMessage(role, tuple(to_part(piece) for piece in pieces)) for role, pieces in chat], frames


async def generate(
    client: PipelineClient,
    messages: Sequence[ChatMessage],
    media: list[bytes],
    sampling: SamplingParams = GREEDY,
    begun: asyncio.Event | None = None,
) -> tuple[list[int], int]:
    """The tokens, and how many the prompt has. `begun` is set when the first token has come."""
    tokens: list[int] = []
    num_prompt_tokens = 0
    async for piece in client.generate(messages, sampling, media):
        tokens += piece.token_ids
        num_prompt_tokens = piece.num_prompt_tokens
        if begun is not None:
            begun.set()
    return tokens, num_prompt_tokens
