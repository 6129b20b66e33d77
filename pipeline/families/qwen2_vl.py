"""Qwen2-VL: a video is one run of placeholders, its frames are resized one by one and go in pairs.

`config.json` is understood in both of its layouts: the flat one of the hub's folders and the nested one of
transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

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
    VideoInfo,
    VisionInfo,
)
from pipeline.families.files import CheckpointFiles, pixel_limits
from pipeline.families.mrope import Run, mrope_positions
from pipeline.families.resizing import smart_resize
from pipeline.families.text import read_text
from pipeline.wire.base import GridTHW

VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a frame
VIDEO_TOKENS = 128_000  # of all frames of a video together, of which 90 % are used
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TORCH_LANES = 8


class Qwen2VL(Family):
    model_type = "qwen2_vl"
    tower = "workers.vit.models.qwen2_vl"
    decoder = "workers.llm.models.qwen2"

    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        files = CheckpointFiles(folder)
        vision = _read_vision(files, min_pixels, max_pixels)
        return ModelInfo(
            family=self,
            folder=folder,
            text=read_text(files),
            vision=vision,
            video=_read_video(files, vision),
            image_token_id=files.integer(files.config, "image_token_id"),
            video_token_id=files.integer(files.config, "video_token_id"),
            eos_token_ids=files.eos_token_ids(),
            default_sampling=files.default_sampling(),
        )

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
        merge = info.vision.merge_size
        runs: list[Run] = []
        for media, (span,) in items:
            grid = media.grid_thw
            runs.append(Run(span, GridTHW(grid.t, grid.h // merge, grid.w // merge)))
        return mrope_positions(num_tokens, runs)


FAMILIES = (Qwen2VL(),)


def _read_vision(files: CheckpointFiles, min_pixels: int | None, max_pixels: int | None) -> VisionInfo:
    vision, processor = files.vision, files.processor
    low, high = pixel_limits(processor)
    if not high and max_pixels is None:
        # 1280 tokens in transformers' class, 16384 in the published files.
        files.need(processor, "max_pixels")
    embed_dim = files.integer(vision, "embed_dim")
    return VisionInfo(
        depth=files.integer(vision, "depth"),
        embed_dim=embed_dim,
        num_heads=files.integer(vision, "num_heads"),
        intermediate_size=int(embed_dim * float(files.need(vision, "mlp_ratio"))),
        embedding_width=int(vision.get("hidden_size") or files.integer(files.text, "hidden_size")),
        patch_size=files.integer(vision, "patch_size"),
        merge_size=files.integer(vision, "spatial_merge_size"),
        temporal_patch_size=int(vision.get("temporal_patch_size") or 2),
        image_mean=tuple(processor.get("image_mean") or CLIP_MEAN),
        image_std=tuple(processor.get("image_std") or CLIP_STD),
        min_pixels=low or 56 * 56,
        max_pixels=high or max_pixels or 0,
    ).with_pixel_limits(min_pixels, max_pixels)


def _read_video(files: CheckpointFiles, vision: VisionInfo) -> VideoInfo:
    """As transformers reads it: a file of its own, else the pictures' limits, here below the largest frame of
    Qwen's own code.
    """
    processor = files.video_processor
    low, high = pixel_limits(processor or files.processor)
    most = vision.max_pixels if processor else min(vision.max_pixels, VIDEO_MAX_PIXELS)
    high = min(high or VIDEO_MAX_PIXELS, most)
    num_tokens = int(processor.get("max_video_tokens") or VIDEO_TOKENS)
    return VideoInfo(
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
