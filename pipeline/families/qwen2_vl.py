"""Qwen2-VL: a video is one run of placeholders, its frames are resized one by one and go in pairs.

`config.json` is understood in both of its layouts: the flat one of the hub's folders and the nested one of
transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.families.base import (
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
from pipeline.families.info import model_info
from pipeline.families.mrope import Run, merged_grid, mrope_positions
from pipeline.families.resizing import smart_resize
from pipeline.families.text import read_text
from pipeline.families.vision import (
    CLIP_MEAN,
    CLIP_STD,
    PictureDefaults,
    TowerSizes,
    read_vision,
    with_server_limits,
)

VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a frame
VIDEO_TOKENS = 128_000  # of all frames of a video together, of which 90 % are used
PICTURE_DEFAULTS = PictureDefaults(CLIP_MEAN, CLIP_STD, 56 * 56)
TORCH_LANES = 8
Video = TypeVar("Video", bound=VideoInfo)


class Qwen2VL(Family):
    model_type = "qwen2_vl"
    tower = "workers.vit.models.qwen2_vl"
    decoder = "workers.llm.models.qwen2"

    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        files = CheckpointFiles(folder)
        vision = with_server_limits(files, _read_vision(files), min_pixels, max_pixels)
        video = read_video(files, vision, VideoInfo)
        return model_info(self, files, read_text(files, TextInfo), vision, video)

    def picture_size(self, size: ImageSize, limits: AreaLimits, info: ModelInfo) -> ImageSize:
        return smart_resize(size, info.vision.factor, limits)

    def frame_size(
        self, size: ImageSize, num_frames: int, limits: AreaLimits, max_total_pixels: int, info: ModelInfo
    ) -> ImageSize:  # fmt: skip
        """Smaller where there are many frames (`cap_pixels_per_frame` of Qwen2-VL's video processor)."""
        share = max(max_total_pixels // num_frames, int(limits.min_pixels * 1.05))
        high = min(limits.max_pixels, share)
        return smart_resize(size, info.vision.factor, AreaLimits(min(limits.min_pixels, high), high))

    def sample_frames(
        self,
        num_source_frames: int,
        source_fps: float,
        fps: float,
        min_frames: int,
        max_frames: int,
        info: ModelInfo,
    ) -> list[int]:
        multiple = info.vision.temporal_patch_size
        return sample_frames(num_source_frames, source_fps, fps, min_frames, max_frames, multiple)

    def segments(self, media: MediaInfo, info: ModelInfo) -> tuple[Segment, ...]:
        return (Placeholders(info.vision.num_tokens(media.grid_thw)),)

    def positions(self, num_tokens: int, items: Sequence[PlacedMedia], info: ModelInfo) -> Positions:
        runs: list[Run] = []
        for media, (span,) in items:
            runs.append(Run(span, merged_grid(media.grid_thw, info.vision.merge_size)))
        return mrope_positions(num_tokens, runs)


FAMILIES = (Qwen2VL(),)


def _read_vision(files: CheckpointFiles) -> VisionInfo:
    vision = files.vision
    files.expect(vision, "hidden_act", "quick_gelu")
    embed_dim = files.integer(vision, "embed_dim")
    sizes = TowerSizes(
        embed_dim=embed_dim,
        intermediate_size=int(embed_dim * float(files.need(vision, "mlp_ratio"))),
        embedding_width=int(vision.get("hidden_size") or files.integer(files.text, "hidden_size")),
    )
    return read_vision(files, VisionInfo, sizes, PICTURE_DEFAULTS)


def read_video(files: CheckpointFiles, vision: VisionInfo, make: Callable[..., Video]) -> Video:
    """As transformers reads it: a file of its own, else the pictures' limits, here below the largest frame of
    Qwen's own code.
    """
    processor = files.video_processor
    low, high = pixel_limits(processor or files.processor)
    most = vision.max_pixels if processor else min(vision.max_pixels, VIDEO_MAX_PIXELS)
    high = min(high or VIDEO_MAX_PIXELS, most)
    num_tokens = int(processor.get("max_video_tokens") or VIDEO_TOKENS)
    return make(
        fps=float(processor.get("fps") or 2.0),
        min_frames=int(processor.get("min_frames") or 4),
        max_frames=int(processor.get("max_frames") or 768),
        min_pixels=min(low or VIDEO_MIN_PIXELS, high),
        max_pixels=high,
        max_total_pixels=int(num_tokens * vision.factor**2 * 0.9) * vision.temporal_patch_size,
    )


def sample_frames(
    num_source_frames: int, source_fps: float, fps: float, min_frames: int, max_frames: int, multiple: int
) -> list[int]:  # fmt: skip
    """Evenly spread frame numbers, about `fps` a second, as many as a multiple of `multiple`.

    As transformers' Qwen2-VL video processor has it (`sample_frames`), rounding included; a video of fewer
    frames than `multiple` is seen whole.
    """
    total = num_source_frames
    if total < multiple:
        return list(range(total))
    most = min(max_frames, total) // multiple * multiple
    wanted = int(min(max(total / source_fps * fps, min_frames), most)) // multiple * multiple
    numbers = _arange(total, total / max(wanted, min(multiple, most))).astype(np.int64)
    return [min(int(number), total - 1) for number in numbers]


def _arange(stop: float, step: float) -> npt.NDArray[np.float32]:
    """`torch.arange(0, stop, step)` to the last bit, which decides between two frames in long videos.

    Torch (`RangeFactoriesKernel.cpp`) computes vectors, two at a time: of each the first value is rounded to
    float32, the others are this plus multiples of the step, rounded again. What is left over is computed one
    by one. A vector has eight values (AVX2, which torch also uses for this where there is AVX-512).
    """
    index = np.arange(math.ceil(stop / step))
    single = (index * step).astype(np.float32)
    lane = index % TORCH_LANES
    base = single[index - lane].astype(np.float64)
    whole = len(index) // (2 * TORCH_LANES) * (2 * TORCH_LANES)
    return np.where(index < whole, (base + lane * step).astype(np.float32), single)
