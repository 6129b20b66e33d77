"""Finds the routes: modules of this package list theirs in `ROUTES`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from workers.api.endpoints.base import Endpoint, Inquiry

PACKAGE = "workers.api.endpoints"


@functools.cache
def routes() -> tuple[type[Endpoint] | type[Inquiry], ...]:
    found: list[type[Endpoint] | type[Inquiry]] = []
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        found += getattr(importlib.import_module(module.name), "ROUTES", ())
    return tuple(found)


def endpoints() -> dict[str, type[Endpoint]]:
    """The routes that ask the model, by path."""
    return {route.path: route for route in routes() if issubclass(route, Endpoint)}
