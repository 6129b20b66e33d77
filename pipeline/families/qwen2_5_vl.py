"""Qwen2.5-VL: Qwen2-VL with windows in the tower, and a video's positions in time by the seconds between its
frames."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.families.base import (
    MediaInfo,
    ModelInfo,
    PlacedMedia,
    Positions,
    TextInfo,
    VideoInfo,
    VisionInfo,
)
from pipeline.families.files import CheckpointFiles
from pipeline.families.info import model_info
from pipeline.families.mrope import Run, merged_grid, mrope_positions
from pipeline.families.qwen2_vl import PICTURE_DEFAULTS, Qwen2VL, read_video
from pipeline.families.text import read_text
from pipeline.families.times import sampled_fps
from pipeline.families.vision import TowerSizes, read_vision, with_server_limits


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedVisionInfo(VisionInfo):
    window_size: int  # merged tokens along a side of an attention window
    full_attention_layers: tuple[int, ...]  # all others attend within windows


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedVideoInfo(VideoInfo):
    positions_per_second: float


class Qwen2_5VL(Qwen2VL):
    model_type = "qwen2_5_vl"
    tower = "workers.vit.models.qwen2_5_vl"
    decoder = "workers.llm.models.qwen2"
    has_frame_times = True

    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        files = CheckpointFiles(folder)
        vision = with_server_limits(files, _read_vision(files), min_pixels, max_pixels)
        # 4 in transformers' class, 2 in the published files.
        rate = float(files.need(files.vision, "tokens_per_second"))
        video = read_video(files, vision, partial(TimedVideoInfo, positions_per_second=rate))
        return model_info(self, files, read_text(files, TextInfo), vision, video)

    def positions(self, num_tokens: int, items: Sequence[PlacedMedia], info: ModelInfo) -> Positions:
        runs: list[Run] = []
        for media, (span,) in items:
            runs.append(
                Run(span, merged_grid(media.grid_thw, info.vision.merge_size), time_step(media, info))
            )
        return mrope_positions(num_tokens, runs)

    def kv_hash(self, mm_hash: bytes, media: MediaInfo, info: ModelInfo) -> bytes:
        """Positions of a video depend on time, which the tower does not see."""
        if media.frames is None:
            return mm_hash
        return hashlib.sha256(mm_hash + repr(time_step(media, info)).encode()).digest()


FAMILIES = (Qwen2_5VL(),)


def time_step(media: MediaInfo, info: ModelInfo) -> float:
    """Positions from one temporal patch of a video to the next; a picture has one patch."""
    if media.frames is None:
        return 1.0
    assert isinstance(info.video, TimedVideoInfo)
    seconds = info.vision.temporal_patch_size / sampled_fps(media.frames)
    # In float32, as in transformers: positions are multiples of it, rounded down.
    return float(np.float32(info.video.positions_per_second) * np.float32(seconds))


def _read_vision(files: CheckpointFiles) -> WindowedVisionInfo:
    vision = files.vision
    files.expect(vision, "hidden_act", "silu")
    sizes = TowerSizes(
        # 3584 in transformers' class, 1280 in the published files.
        embed_dim=files.integer(vision, "hidden_size"),
        intermediate_size=files.integer(vision, "intermediate_size"),
        embedding_width=files.integer(vision, "out_hidden_size"),
    )
    make = partial(
        WindowedVisionInfo,
        window_size=_window_size(files),
        full_attention_layers=tuple(map(int, files.need(vision, "fullatt_block_indexes"))),
    )
    return read_vision(files, make, sizes, PICTURE_DEFAULTS)


def _window_size(files: CheckpointFiles) -> int:
    """From pixels to merged tokens, rounded down, as transformers does."""
    vision = files.vision
    pixels = files.integer(vision, "window_size")
    patch = int(vision.get("patch_size") or files.integer(vision, "spatial_patch_size"))
    merged = pixels // files.integer(vision, "spatial_merge_size") // patch
    if merged < 1:
        raise ValueError(f"model {str(files.folder)!r} has windows of {pixels} pixels, less than one token")
    return merged
