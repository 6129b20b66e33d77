"""The contract of a route: how it decodes a request and renders the answer. Each route is one file.

Routes that ask the model are an `Endpoint`. The server reads the body, submits the result of `decode`, and
sends the result of `render` or `stream`. It knows no route by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec

from pipeline.families import ModelInfo
from pipeline.parsers.forms import ChatForms
from pipeline.wire.errors import ErrorInfo, RequestError, shown
from workers.api.answer import Answer, Update
from workers.api.description.answers import Error
from workers.api.errors import error_body
from workers.api.json_bodies import decode_fields
from workers.api.request_fields import check_model
from workers.api.response_store import NO_STORE, ResponseStore
from workers.api.server_sent_events import DONE, event
from workers.api.submission import Submission
from workers.api.unserved_fields import refuse_unserved

Json = dict[str, Any]


class ServedModel(NamedTuple):
    names: tuple[str, ...]  # that requests may give
    info: ModelInfo
    created: int  # the server's start, in seconds of the epoch
    forms: ChatForms  # of what the model writes in a chat
    is_strict: bool = False  # unknown fields are refused
    max_model_len: int = 0  # once the pipeline serves
    store: ResponseStore = NO_STORE
    adapters: tuple[str, ...] = ()  # that requests may name in the model's place
    adapter: str = ""  # that the request names

    @property
    def name(self) -> str:
        """The name that answers show."""
        return self.adapter or self.names[0]

    @property
    def every_name(self) -> tuple[str, ...]:
        return (*self.names, *self.adapters)

    def of(self, name: str) -> ServedModel:
        """As a request asks for it, by one of `every_name` or by none."""
        return self._replace(adapter=name if name in self.adapters else "")


class Route(ABC):
    """One request to a path. Errors are OpenAI's objects unless the route overrides them."""

    path: ClassVar[str]
    answer: ClassVar[type[msgspec.Struct]]  # what `render` gives
    error: ClassVar[type[msgspec.Struct]] = Error
    field_names: ClassVar[Mapping[str, str]] = {}  # of this API, by those of a chat that it is converted to

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.tenant = ""  # who asks

    @classmethod
    def error_body(cls, error: ErrorInfo) -> Json:
        return error_body(cls.named(error))

    @classmethod
    def named(cls, error: ErrorInfo) -> ErrorInfo:
        """The error with the field as the client has written it."""
        for ours, theirs in cls.field_names.items():
            if error.field == ours or error.field.startswith((f"{ours}.", f"{ours}[")):
                field, message = theirs + error.field.removeprefix(ours), error.message
                if message.startswith(ours):
                    message = theirs + message.removeprefix(ours)
                return msgspec.structs.replace(error, field=field, message=message)
        return error

    @classmethod
    def last_words(cls, error: ErrorInfo) -> bytes:
        """The last events of a stream that fails after it has begun."""
        return event(cls.error_body(error)) + DONE


class Endpoint(Route):
    """A route that asks the model: POST."""

    method: ClassVar[str] = "POST"
    fields: ClassVar[type[msgspec.Struct]]  # of a body
    streams: ClassVar[bool] = True
    # For the description: JSON schemas of fields that say more than their types, and of the whole body.
    forms: ClassVar[Mapping[str, Json]] = {}
    form: ClassVar[Json] = {}

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self.ignored_fields: Sequence[str] = ()  # of the body, after `decode`
        self.reserve: Callable[[int], None] = lambda num_bytes: None  # takes memory beyond the body's

    def read(self, body: bytes | bytearray) -> Any:
        """A struct of the kind `fields`. Raises RequestError for a body that does not fit and, with
        `--strict-fields`, for fields that nobody here knows."""
        request, unknown = decode_fields(body, self.fields)
        self.ignored_fields = refuse_unserved(unknown)
        if self.model.is_strict and self.ignored_fields:
            name = self.ignored_fields[0]
            raise RequestError(f"the field {shown(name)} is not known to this server", field=name)
        return request

    def choose_model(self, name: str) -> None:
        """Raises RequestError for a model that is not served."""
        check_model(name, self.model.every_name)
        self.model = self.model.of(name)

    @abstractmethod
    def decode(self, body: bytes | bytearray) -> Submission:
        """The body's submission. Raises RequestError for a request that is not served.

        Must keep no reference to the body: it may be large, and the answer take long.
        """

    @abstractmethod
    def render(self, answer: Answer) -> Json:
        """The JSON of a whole answer, whose updates were all kept."""

    @abstractmethod
    def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """The events of a stream, and the mark of its end. `answer` counts the `updates` so far, but does not
        have their texts."""


class Inquiry(Route):
    """A route that does not ask the model, once the server serves."""

    method: ClassVar[str] = "GET"

    @abstractmethod
    def render(self, **places: str) -> Json:
        """`places`: what stands in the path's `{name}`s. Raises RequestError."""
