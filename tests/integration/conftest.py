from __future__ import annotations

import pytest

from tests.servers import Server

LIMITS = (
    "--max-model-len",
    "1024",
    "--kv-cache-gib",
    "0.25",
    "--embedding-pool-mib",
    "8",
    "--pixel-pool-mib",
    "8",
)


@pytest.fixture(scope="session")
def server(embedded_server: Server) -> Server:
    return embedded_server
