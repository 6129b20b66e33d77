"""The names of layers in a checkpoint's lists: makers write them with prefixes of their own model classes.

Names are compared as `usual` spells them, which is how `workers/nn/loader.py` names tensors; patterns are
tried on all spellings.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

# Wrappers around a model, outermost first, and how the loader has what is in them.
WRAPPERS = (
    ("thinker.", ""),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("model.visual.", "visual."),
    ("model.mtp.", "mtp."),
)
# The other spellings of what begins so.
SPELLINGS = {
    "model.": ("model.language_model.", "language_model.model."),
    "visual.": ("model.visual.",),
    "lm_head": ("language_model.lm_head",),
    "mtp.": ("model.mtp.",),
}


def usual(name: str) -> str:
    for wrapper, wanted in WRAPPERS:
        if name.startswith(wrapper):
            name = wanted + name.removeprefix(wrapper)
    return name


def spellings(module: str) -> Iterator[str]:
    """All names that a maker may have for a layer that the loader calls so."""
    names = [module]
    for start, others in SPELLINGS.items():
        if module.startswith(start):
            names += [other + module.removeprefix(start) for other in others]
    yield from names
    yield from (f"thinker.{name}" for name in names)


class Names:
    """A list of names and patterns. A name stands for the layer, for all within it, and for every layer whose
    name has it as some of its dotted parts. `re:` begins a regular expression, which matches from the start
    of a name; `*` makes a pattern of a shell."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._names = {usual(entry).strip(".") for entry in entries if not _is_pattern(entry)}
        self._expressions = [re.compile(_expression(entry)) for entry in entries if _is_pattern(entry)]

    def match(self, module: str) -> bool:
        parts = module.split(".")
        ends = range(1, len(parts) + 1)
        if any(".".join(parts[start:end]) in self._names for end in ends for start in range(end)):
            return True
        return any(expression.match(name) for expression in self._expressions for name in spellings(module))


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or "*" in entry or "?" in entry


def _expression(entry: str) -> str:
    return entry.removeprefix("re:") if entry.startswith("re:") else fnmatch.translate(entry)
