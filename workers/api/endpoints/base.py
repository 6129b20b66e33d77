"""The contract of a route, which is one file: what it understands, and how it answers.

Most routes ask the model, and are an `Endpoint`. The server reads the body, submits what `decode` has made of
it, and sends what `render` or `stream` make of the answer. It knows no route by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar, NamedTuple

from pipeline.families import ModelInfo
from pipeline.wire.errors import ErrorInfo
from workers.api.answer import Answer, Update
from workers.api.errors import error_body
from workers.api.server_sent_events import DONE, event
from workers.api.submission import Submission

Json = dict[str, Any]


class ServedModel(NamedTuple):
    name: str  # by which clients know it
    info: ModelInfo
    created: int  # the server's start, in seconds of the epoch


class Route(ABC):
    """One request to a path. Errors are OpenAI's objects where the route has none of its own."""

    path: ClassVar[str]

    def __init__(self, model: ServedModel) -> None:
        self.model = model

    @classmethod
    def error_body(cls, error: ErrorInfo) -> Json:
        return error_body(error)

    @classmethod
    def last_words(cls, error: ErrorInfo) -> bytes:
        """The end of a stream that has begun."""
        return event(cls.error_body(error)) + DONE


class Endpoint(Route):
    """A route that asks the model: POST."""

    @abstractmethod
    def decode(self, body: bytes | bytearray) -> Submission:
        """Raises RequestError for what is not served.

        Of the body nothing is kept here: it may be large, and the answer long.
        """

    @abstractmethod
    def render(self, answer: Answer) -> Json:
        """The whole answer, all of whose updates were kept."""

    @abstractmethod
    def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """The events of a stream, and the mark of its end. `answer` knows what `updates` have added so far,
        but not their texts."""


class Inquiry(Route):
    """A route that tells something of the server, once it serves: GET."""

    @abstractmethod
    def render(self) -> Json: ...
