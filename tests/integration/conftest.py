from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def server(media_folder: Path) -> Iterator[Server]:
    """The embedded model, with local media allowed; in float32, so that answers do not depend on what else is
    computed with them."""
    with Server(
        "--dtype",
        "float32",
        "--allowed-local-media-path",
        str(media_folder),
        "--allow-private-media",
        *LIMITS,
    ) as running:
        yield running
