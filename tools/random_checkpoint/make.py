"""Writes all files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from tools.random_checkpoint.settings import write_settings
from tools.random_checkpoint.shapes import SHAPES
from tools.random_checkpoint.tokenizer import write_tokenizer
from tools.random_checkpoint.weights import write_weights


def make_checkpoint(
    folder: Path,
    name: str,
    device: torch.device | None = None,
    num_layers: int | None = None,
    has_split_experts: bool = False,
) -> None:
    """A random checkpoint of a shape in `SHAPES`, in bfloat16, its tensors made on `device`.

    `num_layers`: of the text, instead of the shape's own. Raises ValueError for a number that the shape does
    not allow.
    """
    shape = SHAPES[name]
    if num_layers is not None:
        shape = shape.with_layers(num_layers)
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, shape)
    write_weights(folder, device or torch.device("cpu"), has_split_experts)
    write_tokenizer(folder, shape)
