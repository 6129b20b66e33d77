"""What differs between families of models, before the tower: one file a family, found by `model_type`."""

from __future__ import annotations

from pipeline.families.base import (
    MAX_ASPECT_RATIO,
    AreaLimits,
    EmbeddingSpec,
    Family,
    ImageSize,
    MediaInfo,
    ModelInfo,
    PlacedMedia,
    Placeholders,
    Positions,
    SampledFrames,
    Segment,
    TextInfo,
    VideoInfo,
    VisionInfo,
    WithoutMarks,
)
from pipeline.families.registry import read_model_info

__all__ = [
    "MAX_ASPECT_RATIO",
    "AreaLimits",
    "EmbeddingSpec",
    "Family",
    "ImageSize",
    "MediaInfo",
    "ModelInfo",
    "PlacedMedia",
    "Placeholders",
    "Positions",
    "SampledFrames",
    "Segment",
    "TextInfo",
    "VideoInfo",
    "VisionInfo",
    "WithoutMarks",
    "read_model_info",
]
