"""Request fields of several endpoints, apart from prompt and sampling."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pipeline.wire.errors import MODEL_NOT_FOUND, ErrorInfo, RequestError, shown


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # the usage so far, in every chunk

    @property
    def is_continuous(self) -> bool:
        """As in vLLM, where the one option needs the other."""
        return self.include_usage and self.continuous_usage_stats


class RequestFields(msgspec.Struct, kw_only=True):
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int | None = None  # lower goes first
    cache_salt: str | None = None  # only requests with the same salt share cached prefixes
    # These do not change the answer, and are ignored.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def check_request(fields: RequestFields) -> None:
    """Raises RequestError for a field out of range."""
    if fields.priority is not None and not -(2**31) <= fields.priority < 2**31:
        raise RequestError(f"priority must fit 32 bits, got {shown(fields.priority)}", field="priority")
    if fields.stream_options is not None and not fields.stream:
        raise RequestError("stream_options need stream to be true", field="stream_options")


def check_model(name: str, model_names: Sequence[str]) -> None:
    """Raises RequestError for a name that is not served; without one it is the model itself."""
    if name and name not in model_names:
        raise RequestError.from_info(unknown_model(name, model_names))


def unknown_model(name: str, model_names: Sequence[str]) -> ErrorInfo:
    served = ", ".join(map(repr, model_names))
    what = f"the model {shown(name)} is not served here, only {served}"
    return ErrorInfo(404, what, "model", MODEL_NOT_FOUND)
