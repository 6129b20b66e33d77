"""Qwen3-VL, dense and with experts: a video is one run of placeholders for each temporal patch, behind its
time in seconds, and its area is limited over all frames together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.families.base import (
    MAX_ASPECT_RATIO,
    AreaLimits,
    Family,
    ImageSize,
    MediaInfo,
    ModelInfo,
    PlacedMedia,
    Placeholders,
    Positions,
    Segment,
    TextInfo,
    VideoInfo,
    VisionInfo,
)
from pipeline.families.files import CheckpointFiles, pixel_limits
from pipeline.families.mrope import Run, merged_grid, mrope_positions
from pipeline.families.resizing import smart_resize
from pipeline.families.text import read_text
from pipeline.families.times import patch_times
from pipeline.families.vision import TowerSizes, read_vision, with_server_limits

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
# The chat template writes a pair of marks around a video. Here each frame has a pair of its own inside that
# pair, as transformers has it from 5.10 on. False: the outer pair is left out, as in 4.57 to 5.9.
KEEPS_OUTER_MARKS = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsInfo:
    """The experts of a decoder's MLPs."""

    num_experts: int
    num_chosen: int  # by each token
    intermediate_size: int  # of each expert
    layers: tuple[int, ...]  # those with experts; all others have one dense MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3TextInfo(TextInfo):
    num_features: int  # further columns of an embedding: layer i adds the i-th to its output (deepstack)
    experts: ExpertsInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VisionInfo(VisionInfo):
    position_side: int  # of the square table of learned positions
    deepstack_layers: tuple[int, ...]  # layers whose outputs become further columns of an embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VideoInfo(VideoInfo):
    min_total_pixels: int  # of all frames together
    # Whether no frame is larger than this and than its even share of all (`cap_pixels_per_frame`).
    capped_frame_pixels: int | None
