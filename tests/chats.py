"""The chats on which greedy tokens must be Hugging Face's, and their form for the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from pipeline.messages import ChatMessage, ImagePart, TextPart
from tests.pictures import encode, noise, scene

Chat = Sequence[tuple[str, Sequence[str | Image.Image]]]

CHATS: dict[str, Chat] = {
    "text only": [("user", ["What is the capital of France?"])],
    "system and text": [("system", ["Answer in a few words."]), ("user", ["Hello"]), ("assistant", ["Hi!"]), ("user", ["Who are you?"])],
    "one picture": [("user", [scene(1), "What is in this picture?"])],
    "three pictures between texts": [("user", ["First", scene(2), "then", scene(3, (140, 112)), "and", scene(4), "What changed?"])],
    "very different sizes": [("user", [noise(5, (28, 28)), "or", noise(6, (500, 60)), "or", scene(7, (300, 420)), "Which is largest?"])],
    "pictures in two turns": [
        ("user", [scene(8), "What is it?"]),
        ("assistant", ["A red circle."]),
        ("user", ["And this one?", scene(9, (224, 168))]),
    ],
}


def to_messages(chat: Chat) -> tuple[list[ChatMessage], list[bytes]]:
    """The messages, and the pictures' bytes as frames."""
    frames: list[bytes] = []
    messages: list[ChatMessage] = []
    for role, parts in chat:
        content: list[TextPart | ImagePart] = []
        for part in parts:
            if isinstance(part, str):
                content.append(TextPart(part))
            else:
                content.append(ImagePart(frame=len(frames)))
                frames.append(encode(part))
        messages.append(ChatMessage(role, tuple(content)))
    return messages, frames
