"""Small stand-ins for what a core is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.wire.errors import PipelineError
from pipeline.wire.topology import Role, WorkerId

LLM_0 = WorkerId(Role.LLM)
VIT_0 = WorkerId(Role.VIT)
PREPROCESS = WorkerId(Role.PREPROCESS)
CARRIER_0 = WorkerId(Role.CARRIER)


class FakeSink:
    """Keeps what is sent. `room`: for so many messages more."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.frames: list[Sequence[bytes | memoryview]] = []  # of all messages
        self.room: int | None = None  # None: no end of it

    def send(self, message: Any, frames: Sequence[bytes | memoryview] = ()) -> None:
        if self.room is not None:
            if not self.room:
                raise PipelineError("the queue is full")
            self.room -= 1
        self.sent.append(message)
        self.frames.append(frames)

    def take(self, kind: type | None = None) -> list[Any]:
        taken = [message for message in self.sent if kind is None or isinstance(message, kind)]
        self.sent = [message for message in self.sent if kind is not None and not isinstance(message, kind)]
        return taken


class FakePublisher:
    """Keeps what is published, by topic; topics in `full` do not keep up."""

    def __init__(self) -> None:
        self.published: list[tuple[bytes, Any]] = []
        self.full: set[bytes] = set()

    def __call__(self, message: Any, topic: bytes) -> bool:
        if topic in self.full:
            return False
        self.published.append((topic, message))
        return True

    def take(self, kind: type, where: Callable[[Any], bool] = lambda message: True) -> list[Any]:
        taken = [message for _, message in self.published if isinstance(message, kind) and where(message)]
        self.published = [(topic, message) for topic, message in self.published if message not in taken]
        return taken
