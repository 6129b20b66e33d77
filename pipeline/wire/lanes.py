"""Messages of the lanes: pieces of work of all workers, which the page shows while somebody looks."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pipeline.wire.base import WorkerMessage

MAX_SHOWN_REQUESTS = 64  # of one piece of work; further ones are left out
MAX_SHOWN_SPANS = 256  # of one message


class LaneSpan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A piece of work, or several steps of the LLM in a row that are alike. Times are seconds of the
    machine's monotonic clock, the same for all processes."""

    name: str
    start: float
    end: float | None  # None: it goes on; the next piece of this name tells its end
    request_ids: tuple[str, ...]
    amount: int = 0  # tokens or patches
    num_steps: int = 1


class WorkDone(WorkerMessage, frozen=True, kw_only=True):
    """worker → api: my latest pieces of work. May be dropped."""

    spans: Annotated[tuple[LaneSpan, ...], msgspec.Meta(max_length=MAX_SHOWN_SPANS)]
    num_dropped: int = 0  # since the sender began: pieces of work that were too many to be told


# lanes: workers → api
LanesMessage = WorkDone
