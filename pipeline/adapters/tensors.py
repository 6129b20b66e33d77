"""Names and shapes of the tensors in files of safetensors, without their contents.

A file is the length of a JSON header, the header, and the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Prefixes of transformers 5, and the older names for them.
PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> bytes:
    """Raises ValueError for a file that has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 0 < length < path.stat().st_size else b""
    if len(header) != length or not header:
        raise ValueError(f"{path.name} is no file of safetensors")
    return header


def check_whole(path: Path, header: bytes) -> None:
    """Raises ValueError where the file is longer or shorter than its header says."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads(header)
        stops = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path.name} is no file of safetensors") from None
    wanted, found = 8 + len(header) + max(stops, default=0), path.stat().st_size
    if found != wanted:
        raise ValueError(f"{path.name} has {found} bytes, by its header {wanted}")


def tensors_of(path: Path, header: bytes) -> Mapping[str, StoredTensor]:
    try:
        entries: dict[str, Any] = json.loads(header)
    except ValueError:
        raise ValueError(f"{path.name} is no file of safetensors") from None
    return {
        name: StoredTensor(tuple(entry["shape"]), entry["dtype"])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def tensors_in(folder: Path) -> Mapping[str, StoredTensor]:
    """All of a checkpoint's, under their usual names. Raises ValueError for a file that is none."""
    return {
        usual_name(name): tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in tensors_of(path, read_header(path)).items()
    }


def usual_name(name: str) -> str:
    """As the hub's older checkpoints have it: `model.layers.…`, `visual.…`."""
    for found, wanted in PREFIXES:
        if name.startswith(found):
            return wanted + name.removeprefix(found)
    return name
