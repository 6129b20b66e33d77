"""Options of the HTTP endpoint."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from pipeline.config.base import at_least, option

MAX_KEY_BYTES = 48 << 10  # of all API keys: the configuration goes to each worker in one message, of 64 KiB
KEY_OVERHEAD = 16  # bytes of each one there
MAX_CONNECTIONS = 8192
ACCESS_LOGS = ("off", "text", "json")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key of the endpoint. Several may have one name: they are one client's."""

    name: str
    key: str = field(repr=False)

    @classmethod
    def unnamed(cls, key: str) -> ApiKey:
        return cls(f"key-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}", key)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = option(8000, "port to listen on", metavar="PORT")
    api_key: tuple[str, ...] = option(
        (),
        "key that clients must send; several may be given, also by --api-key-file and VLM_API_KEY",
        metavar="KEY",
    )
    api_key_file: str = option(
        "",
        "file with a key in each line, as NAME:KEY; # begins a comment",
        metavar="FILE",
    )
    named_keys: tuple[ApiKey, ...] = ()  # of the file and the environment: no option of its own
    key_is_in_environment: bool = False  # the variable's value is a key, as a shell may put it into a header
    admin_key: str = option(
        "", "key for POST /admin/reload; without it there is no such route", metavar="KEY"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names by which clients may call the server, * for any, besides localhost and --host (default: no "
        "others if --host is a loopback address, else any)",
        metavar="HOST",
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "origins of web pages that may call the server from a browser (CORS), as https://HOST; * for any",
        metavar="ORIGIN",
    )
    ssl_certfile: str = option("", "certificate chain (PEM): the server then speaks https", metavar="FILE")
    ssl_keyfile: str = option(
        "", "the certificate's key (PEM, no password), if --ssl-certfile has none", metavar="FILE"
    )
    ssl_ca_certs: str = option(
        "",
        "authorities (PEM): clients must then show a certificate that one of them has signed",
        metavar="FILE",
    )
    disable_page: bool = option(False, "serve no page for browsers at /")
    max_queued_requests: int | None = option(
        None,
        "further requests get 429 while so many are unfinished, running ones too (default: only "
        "--max-open-requests limits them)",
        metavar="N",
    )
    access_log: str = option(
        "off", "a line for each HTTP request, on standard error; json: as an object", choices=ACCESS_LOGS
    )
    vllm_metric_names: bool = option(
        False,
        "/metrics also shows what vLLM measures under vLLM's own names (vllm:…), for dashboards made for it",
    )
    strict_fields: bool = option(
        False, "refuse fields of a request that the server does not know, instead of ignoring them"
    )
    max_request_mib: int = option(64, "largest HTTP body, in MiB", metavar="MIB")
    api_memory_mib: int | None = option(
        None,
        "memory for HTTP bodies, coming in or of open requests, in MiB; more wait a moment, then get 503 "
        "(default: a sixteenth of the machine's, but room for 4 to 16 of the largest)",
        metavar="MIB",
    )
    tool_call_parser: str = option(
        "auto",
        "how the model writes calls of functions: auto (as its chat template shows), none, or a form's name",
        metavar="NAME",
    )
    reasoning_parser: str = option(
        "auto", "how the model writes its thoughts: auto, none, or a form's name", metavar="NAME"
    )
    trust_forwarded_for: bool = option(
        False,
        "a client without a key is told by the last address of X-Forwarded-For: only behind a proxy that "
        "sets it",
    )

    def __post_init__(self) -> None:
        at_least(self, port=0, max_request_mib=1, max_queued_requests=1)
        at_least(self, api_memory_mib=2 * self.max_request_mib)
        self._check_keys()
        for origin in self.allowed_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origins: {origin!r} is not like https://host or http://host:port")
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) and not self.ssl_certfile:
                raise ValueError(f"{name} needs ssl_certfile")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")

    def _check_keys(self) -> None:
        names: dict[str, str] = {}
        for key in self.keys:
            if not key.key or not key.key.isprintable() or " " in key.key:
                raise ValueError(f"the API key {key.name!r} must have printable characters without spaces")
            if (other := names.setdefault(key.key, key.name)) != key.name:
                raise ValueError(f"the API keys {other!r} and {key.name!r} are the same")
        if (
            size := sum(len(key.name) + len(key.key.encode()) + KEY_OVERHEAD for key in self.keys)
        ) > MAX_KEY_BYTES:
            raise ValueError(
                f"API keys, their names and {KEY_OVERHEAD} bytes for each may have {MAX_KEY_BYTES} bytes "
                f"together, got {size}"
            )

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All keys; without one everybody is served."""
        return (*self.named_keys, *map(ApiKey.unnamed, self.api_key))
