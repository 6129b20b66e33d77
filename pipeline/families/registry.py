"""Finds a checkpoint's family by its `model_type`.

Ours are the modules of this package, each of which may name some in `FAMILIES`. Other packages add theirs by
entry points of the group `vlm_pipeline.families`. An entry point is named as the `model_type` is, and refers
to a subclass of `Family`:

    [options.entry_points]
    vlm_pipeline.families =
        toy_vl = toy_package.family:ToyFamily
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

from pipeline.families.base import Family, ModelInfo
from pipeline.families.files import read_json

PACKAGE = "pipeline.families"
GROUP = "vlm_pipeline.families"
# Relatives of the served families that people try, and what about them is not served.
OMNI = "it hears and speaks, and no audio is served"
RETRIEVAL = "it makes embeddings for retrieval and writes no text"
REFUSED: Mapping[str, str] = {
    "qwen2_5_omni": OMNI,
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe": OMNI,
    "qwen3_omni_moe_thinker": OMNI,
    "qwen2_audio": OMNI,
    "qwen4_exp": "its hyper-connections, n-gram tables and sparse attention are not served",
    "colqwen2": RETRIEVAL,
    "colqwen2_5": RETRIEVAL,
    "colqwen3": RETRIEVAL,
    "colqwen3_5": RETRIEVAL,
}


@functools.cache
def families() -> Mapping[str, Family]:
    """Ours by `model_type`."""
    found: list[Family] = []
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        found += getattr(importlib.import_module(module.name), "FAMILIES", ())
    return {family.model_type: family for family in found}


@functools.cache
def _entry_points() -> Mapping[str, EntryPoint]:
    """Of others, by name. Asked only where none of ours fits: no installed package takes the place of one."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


@functools.cache
def find_family(model_type: str) -> Family | None:
    """Raises ValueError for an entry point that names no family of this type."""
    if (family := families().get(model_type)) is not None:
        return family
    entry = _entry_points().get(model_type)
    return None if entry is None else _load(entry)


def _load(entry: EntryPoint) -> Family:
    where = f"the entry point {entry.name!r} = {entry.value!r} of the group {GROUP!r}"
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Family) and found.model_type == entry.name):
        raise ValueError(f"{where} must name a Family with the model_type {entry.name!r}")
    return found()


def read_model_info(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ModelInfo:
    """What a checkpoint says; limits that are given replace its own.

    Raises ValueError when the folder is no checkpoint of a known family, or lacks a key that the family
    needs.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {str(folder)!r} has no config.json")
    name = str(read_json(folder / "config.json").get("model_type"))
    family = find_family(name)
    if family is None:
        served = ", ".join(sorted({*families(), *_entry_points()}))
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise ValueError(f"model {str(folder)!r} is of the family {name!r}{reason}; served are {served}")
    return family.read(folder, min_pixels, max_pixels)
