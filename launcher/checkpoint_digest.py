"""A digest of a model's folder, by which nodes tell that they have the same checkpoint. Pure, but for
reading."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

NUM_SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a file of weights, besides its size
WHOLE_BYTES = 64 << 20  # smaller files are read whole
SKIPPED = (".md", ".lock")


def checkpoint_digest(folder: Path) -> str:
    """Of the names of all files, and of their content; of large ones, of samples: reading all weights takes
    minutes. Documents do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(SKIPPED):
            digest.update(repr((path.name, path.stat().st_size)).encode())
            _add_content(digest, path)
    return digest.hexdigest()


def _add_content(digest: hashlib.blake2b, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return
        for number in range(NUM_SAMPLES):
            # the first sample has the header of a safetensors file, the last one ends the file
            file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1), os.SEEK_SET)
            digest.update(file.read(SAMPLE_BYTES))
