"""What is known of one HTTP request, and the line that the access log writes about it. Never its contents."""

from __future__ import annotations

import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec
from aiohttp import web

from workers.api.answer import Answer

logger = logging.getLogger(__name__)
HEADER = "X-Request-Id"
HEADERS = (HEADER, "Request-Id")  # the second is where Anthropic's clients look
MAX_PATH = 200  # characters
CLIENT_LEFT = 499  # nginx's status for a client that left before its answer
_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable, without spaces


def request_id_of(request: web.Request) -> str:
    """The client's id for its request, or a new one. The pipeline never sees it: two clients may use one."""
    given = request.headers.get(HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Filled in while the request is handled."""

    request_id: str
    key_name: str  # empty without a key
    began: float = field(default_factory=time.monotonic)
    status: int = CLIENT_LEFT
    failed_status: int = 0  # of the error, also of one within a stream whose status was sent
    streamed_at: float | None = None  # when a stream's head was sent, which is with the first token
    first_token_at: float | None = None
    completion_id: str = ""  # of the pipeline
    answer: Answer | None = None  # the model's

    def on_first_token(self) -> None:
        self.first_token_at = time.monotonic()


RECORD = web.RequestKey("record", RequestRecord)


class AccessLine(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One line, as JSON writes it. What is unknown is left out."""

    time: str
    request_id: str
    method: str
    path: str
    status: int
    ms: float
    peer: str = ""
    key: str = ""
    completion_id: str = ""
    ttft_ms: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def text(self) -> str:
        known = {name: getattr(self, name) for name in self.__struct_fields__[6:]}
        rest = "".join(f" {name}={value}" for name, value in known.items() if value not in ("", None))
        return f"{self.method} {self.path} {self.status} {self.ms} ms request_id={self.request_id}{rest}"


def access_line(request: web.Request, record: RequestRecord) -> AccessLine:
    """The query is left out: it may hold secrets."""
    path = request.raw_path.partition("?")[0][:MAX_PATH]
    usage = None if record.answer is None else record.answer.usage
    line = AccessLine(
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        request_id=record.request_id,
        method=request.method,
        path=path.encode("ascii", "backslashreplace").decode(),
        status=record.status,
        ms=_ms(time.monotonic() - record.began),
        peer=request.remote or "",
        key=record.key_name,
        completion_id=record.completion_id,
    )
    if record.streamed_at is not None:
        line.ttft_ms = _ms(record.streamed_at - record.began)
    if usage is not None and usage.num_prompt_tokens:
        line.prompt_tokens, line.output_tokens = usage.num_prompt_tokens, usage.num_output_tokens
    return line


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def writer_of(kind: str) -> Callable[[web.Request, RequestRecord], None]:
    """Writes a request's line to standard error: among the log's lines, or as a bare JSON object."""

    def write_text(request: web.Request, record: RequestRecord) -> None:
        logger.info("%s", access_line(request, record).text())

    def write_json(request: web.Request, record: RequestRecord) -> None:
        sys.stderr.write(msgspec.json.encode(access_line(request, record)).decode() + "\n")

    def write_nothing(request: web.Request, record: RequestRecord) -> None:
        pass

    return {"off": write_nothing, "text": write_text, "json": write_json}[kind]
