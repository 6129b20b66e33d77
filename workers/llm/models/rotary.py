"""Rotary constants that decoders share."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.families import TextInfo


def mrope_constants(
    info: TextInfo,
    device: torch.device,
    has_interleaved_axes: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The row of positions (time, height, width) that each frequency turns with, and the frequencies in
    float32. Both [rotary_dim / 2].

    `rotary_dim`: the numbers of a head that are turned, from its first; None: all of them. A row's
    frequencies lie side by side; interleaved, the rows take turns. `mrope_section` says how many frequencies
    each row has.
    """
    section, dim = info.mrope_section, rotary_dim or info.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / (info.rope_theta**exponents)
    if sum(section) != len(frequencies):
        raise ValueError(
            f"mrope_section {section} adds up to {sum(section)}, a head has {len(frequencies)} frequencies",
        )
    if has_interleaved_axes:
        axes = [_interleaved_axis(number, section) for number in range(len(frequencies))]
    else:
        axes = [axis for axis, length in enumerate(section) for _ in range(length)]
    return torch.tensor(axes, device=device), frequencies


def _interleaved_axis(number: int, section: tuple[int, ...]) -> int:
    """A row that has all its frequencies leaves its turns to the row of time."""
    axis = number % 3
    return axis if number < 3 * section[axis] else 0
