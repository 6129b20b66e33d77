"""The place of a request in its client's trace: W3C Trace Context. See docs/tracing.md."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pipeline.wire.errors import RequestError

MAX_TRACEPARENT = 64  # characters; one of today's version has 55
MAX_TRACESTATE = 512


class TraceContext(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The caller's place in its trace: the values of the headers `traceparent` and `tracestate`.

    An invalid one is not followed. Raises RequestError for one that is too long.
    """

    traceparent: Annotated[str, msgspec.Meta(max_length=MAX_TRACEPARENT)]
    tracestate: Annotated[str, msgspec.Meta(max_length=MAX_TRACESTATE)] = ""

    def __post_init__(self) -> None:
        if len(self.traceparent) > MAX_TRACEPARENT or len(self.tracestate) > MAX_TRACESTATE:
            raise RequestError("the trace context is too long", field="trace_context")


# On the wire the field is there only where a client gave it: a request that is not traced costs nothing.
Trace = TraceContext | msgspec.UnsetType
