"""Errors as clients are told."""

from __future__ import annotations

from pipeline.wire.errors import RequestError
from workers.api.errors import error_body


def test_error_object() -> None:
    error = RequestError("bad", field="messages[0]", status=400).info
    assert error_body(error) == {
        "error": {"message": "bad", "type": "invalid_request_error", "param": "messages[0]", "code": 400}
    }
