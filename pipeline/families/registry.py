"""Finds a checkpoint's family: each module of this package may name some in `FAMILIES`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.families.base import Family, ModelInfo
from pipeline.families.files import read_json

PACKAGE = "pipeline.families"


@functools.cache
def families() -> Mapping[str, Family]:
    """All families by `model_type`."""
    found: list[Family] = []
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        found += getattr(importlib.import_module(module.name), "FAMILIES", ())
    return {family.model_type: family for family in found}


def read_model_info(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ModelInfo:
    """What a checkpoint says; limits that are given replace its own.

    Raises ValueError when the folder is no checkpoint of a known family, or lacks a key that the family
    needs.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {str(folder)!r} has no config.json")
    name = str(read_json(folder / "config.json").get("model_type"))
    family = families().get(name)
    if family is None:
        served = ", ".join(sorted(families()))
        raise ValueError(f"model {str(folder)!r} is of the family {name!r}; served are {served}")
    return family.read(folder, min_pixels, max_pixels)
