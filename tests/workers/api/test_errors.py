"""Errors as clients are told."""

from __future__ import annotations

import pytest

from pipeline.wire.errors import MODEL_NOT_FOUND, ErrorInfo, RequestError, context_overflow
from workers.api.errors import error_body


def test_error_object() -> None:
    error = RequestError("bad", field="messages[0]", status=400).info
    assert error_body(error) == {
        "error": {"message": "bad", "type": "invalid_request_error", "param": "messages[0]", "code": None}
    }


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ErrorInfo(401, "x"), "authentication_error", "invalid_api_key"),
        (ErrorInfo(403, "x"), "permission_error", None),
        (ErrorInfo(404, "x"), "not_found_error", None),
        (ErrorInfo(404, "x", "model", MODEL_NOT_FOUND), "invalid_request_error", "model_not_found"),
        (ErrorInfo(415, "x"), "invalid_request_error", None),
        (ErrorInfo(429, "x"), "rate_limit_error", "rate_limit_exceeded"),
        (ErrorInfo(500, "x"), "server_error", None),
        (ErrorInfo(503, "x"), "server_error", "service_unavailable"),
        (context_overflow(9, 10, 1, "messages"), "invalid_request_error", "context_length_exceeded"),
    ],
)
def test_types_and_codes(error: ErrorInfo, kind: str, code: str | None) -> None:
    body = error_body(error)["error"]
    assert (body["type"], body["code"]) == (kind, code)
