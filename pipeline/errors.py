"""The two kinds of error: one ends a request, the other stops the pipeline."""

from __future__ import annotations

import reprlib

import msgspec

MAX_SHOWN = 80  # characters of a value in an error's text


class ErrorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client is told: an HTTP status, a sentence without internals, and the body's field at fault ("" if none)."""

    status: int
    message: str
    field: str = ""


class RequestError(Exception):
    """Ends one request. `message` reaches the client, so it never carries the text of a decoder or of the system."""

    def __init__(self, message: str, *, field: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.info = ErrorInfo(status, message, field)

    @classmethod
    def from_info(cls, info: ErrorInfo) -> RequestError:
        return cls(info.message, field=info.field, status=info.status)


class PipelineError(Exception):
    """Something that must not happen did: the worker stops, and with it the pipeline."""


def shown(value: object) -> str:
    """A value from outside for an error's text: short, however long, deep or odd it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = MAX_SHOWN
    try:
        return short.repr(value)[: 2 * MAX_SHOWN]
    except Exception:  # noqa: BLE001  more digits than Python prints, a nesting deeper than its stack
        return f"a value of type {type(value).__name__}"
