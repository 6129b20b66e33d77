"""The two kinds of error: one ends a request, the other stops the pipeline."""

from __future__ import annotations

import reprlib

import msgspec

MAX_MESSAGE = 300  # characters of an error message to a client
MAX_FIELD = 200
MAX_SHOWN = 120  # characters of a value in an error's text
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
MODEL_NOT_FOUND = "model_not_found"
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring, _REPR.maxlong = 2, 3, 3, 60, 40


def shown(value: object) -> str:
    """A short form of any value from outside, however long, deep or odd, for an error's text."""
    try:
        return _REPR.repr(value)[:MAX_SHOWN]
    except Exception:  # noqa: BLE001  more digits than Python prints, a nesting deeper than its stack
        return f"a value of type {type(value).__name__}"


class ErrorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client is told: an HTTP status, a sentence without internals, the body's field at fault (""
    if none), and OpenAI's code for the error ("": what the status says)."""

    status: int
    message: str
    field: str = ""
    code: str = ""


class RequestError(Exception):
    """Ends one request. `message` reaches the client: it never quotes a decoder's or the system's error.

    `message` and `field` may echo the client's input. They are cut, and lone surrogates, which no encoder
    accepts, are replaced.
    """

    def __init__(self, message: str, *, field: str = "", status: int = 400, code: str = "") -> None:
        message = _printable(message, MAX_MESSAGE)
        super().__init__(message)
        self.info = ErrorInfo(status, message, _printable(field, MAX_FIELD), code)

    @classmethod
    def from_info(cls, info: ErrorInfo) -> RequestError:
        return cls(info.message, field=info.field, status=info.status, code=info.code)


def context_overflow(
    limit: int, num_prompt_tokens: int, max_tokens: int | None, field: str, *, is_least: bool = False
) -> ErrorInfo:
    """The refusal of a request that is longer than the context. `is_least`: the prompt may be longer.

    Client programs recognise an overflow by its code, by the first words of OpenAI's and vLLM's text, or by
    the last words, which are SGLang's.
    """
    num_output = 1 if max_tokens is None else max_tokens
    least = "at least " if is_least else ""
    text = (
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{least}{num_prompt_tokens + num_output} tokens ({least}{num_prompt_tokens} in the messages, "
        f"{num_output} in the completion). Please reduce the length of the messages or completion: the "
        "request is longer than the model's context length."
    )
    return ErrorInfo(400, text, field, CONTEXT_LENGTH_EXCEEDED)


def _printable(text: str, limit: int) -> str:
    kept = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return kept.encode("utf-8", "replace").decode()


class PipelineError(Exception):
    """A broken invariant or failed start: stops the worker, and with it the pipeline."""
