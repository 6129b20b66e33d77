"""A route and a parser that no model has: each is one file, found in its folder like ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers.api import endpoints, parsers
from workers.api.endpoints import registry


@contextmanager
def installed() -> Iterator[None]:
    """The toys' folders are parts of the packages."""
    with pytest.MonkeyPatch.context() as patch:
        for package in (endpoints, parsers):
            folder = Path(__file__).parent / package.__name__.rpartition(".")[2]
            patch.setattr(package, "__path__", [*package.__path__, str(folder)])
        registry.routes.cache_clear()
        try:
            yield
        finally:
            registry.routes.cache_clear()
