"""Rotary constants that decoders share."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.families import TextInfo


def mrope_constants(info: TextInfo, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row of positions that each frequency turns with, where a row's frequencies lie side by side, and
    the frequencies in float32.

    Both [head_dim / 2].
    """
    section, dim = info.mrope_section, info.head_dim
    axes = torch.tensor([axis for axis, length in enumerate(section) for _ in range(length)], device=device)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / (info.rope_theta**exponents)
    if len(axes) != len(frequencies):
        raise ValueError(
            f"mrope_section {section} adds up to {sum(section)}, the head has {len(frequencies)} frequencies",
        )
    return axes, frequencies
