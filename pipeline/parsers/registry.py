"""Finds the forms of calls and thoughts: modules of this package name theirs in `FORM`.

A form is chosen by what the chat template says, unless somebody names one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import TypeVar

from pipeline.parsers.base import ThoughtForm, ToolForm

PACKAGE = "pipeline.parsers"
AUTO, NONE = "auto", "none"
F = TypeVar("F", ToolForm, ThoughtForm)


@functools.cache
def forms() -> tuple[ToolForm | ThoughtForm, ...]:
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        form = getattr(importlib.import_module(module.name), "FORM", None)
        if form is not None:
            found.append(form)
    return tuple(found)


def find_tool_form(name: str, template: str) -> ToolForm | None:
    """Raises ValueError for an unknown name."""
    known = [form for form in forms() if isinstance(form, ToolForm)]
    found = _find(known, "tool call", name, template)
    if found is None and name == AUTO:
        return next(form for form in known if form.is_fallback)
    return found


def find_thought_form(name: str, template: str) -> ThoughtForm | None:
    """Raises ValueError for an unknown name."""
    return _find([form for form in forms() if isinstance(form, ThoughtForm)], "reasoning", name, template)


def check_names(tool_call_parser: str, reasoning_parser: str) -> None:
    """Raises ValueError for an unknown name."""
    find_tool_form(tool_call_parser, "")
    find_thought_form(reasoning_parser, "")


def _find(known: Sequence[F], what: str, name: str, template: str) -> F | None:
    if name == NONE:
        return None
    for form in known:
        if name in form.names or (name == AUTO and form.fits(template)):
            return form
    if name != AUTO:
        names = ", ".join([AUTO, NONE, *(one for form in known for one in form.names)])
        raise ValueError(f"there is no {what} parser {name!r}; known are {names}")
    return None
