"""A route and a parser that no model has: each is one file, found in its folder like ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import parsers
from pipeline.parsers.registry import forms
from workers.api import endpoints
from workers.api.endpoints.registry import routes


@contextmanager
def installed() -> Iterator[None]:
    """The toys' folders are parts of the packages."""
    with pytest.MonkeyPatch.context() as patch:
        for package in (endpoints, parsers):
            folder = Path(__file__).parent / package.__name__.rpartition(".")[2]
            patch.setattr(package, "__path__", [*package.__path__, str(folder)])
        routes.cache_clear()
        forms.cache_clear()
        try:
            yield
        finally:
            routes.cache_clear()
            forms.cache_clear()
