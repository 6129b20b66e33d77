"""Options of the endpoint for clients on other machines, straight over ZeroMQ."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.base import option


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectConfig:
    direct_port: int | None = option(
        None,
        "first of three tcp ports for clients on other machines, straight over ZeroMQ, encrypted (default: "
        "none)",
        metavar="PORT",
    )
    direct_host: str = option("127.0.0.1", "address to listen on for them", metavar="ADDRESS")
    direct_keys: str = option(
        "",
        "folder of CURVE keys that tools/keys.py has made: the server's and its clients'",
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        if (self.direct_port is not None) != bool(self.direct_keys):
            raise ValueError("direct_port and direct_keys go together")
        if self.direct_port is not None and not 1 <= self.direct_port <= 65533:
            raise ValueError(f"direct_port must be at least 1 and at most 65533, got {self.direct_port}")
