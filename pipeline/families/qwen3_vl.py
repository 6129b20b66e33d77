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
    WithoutMarks,
)
from pipeline.families.files import CheckpointFiles, pixel_limits
from pipeline.families.info import model_info
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

    @property
    def has_dense_mlps(self) -> bool:
        return self.experts is None or len(self.experts.layers) < self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VisionInfo(VisionInfo):
    position_side: int  # of the square table of learned positions
    deepstack_layers: tuple[int, ...]  # layers whose outputs become further columns of an embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VideoInfo(VideoInfo):
    min_total_pixels: int  # of all frames together
    # Whether no frame is larger than this and than its even share of all (`cap_pixels_per_frame`).
    capped_frame_pixels: int | None


class Qwen3VL(Family):
    model_type = "qwen3_vl"
    tower = "workers.vit.models.qwen3_vl"
    decoder = "workers.llm.models.qwen3"
    has_frame_times = True

    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        files = CheckpointFiles(folder)
        vision = with_server_limits(files, _read_vision(files), min_pixels, max_pixels)
        text = _read_text(files, vision, self.read_experts(files))
        return model_info(self, files, text, vision, read_video(files, vision))

    def read_experts(self, files: CheckpointFiles) -> ExpertsInfo | None:
        return None

    def picture_size(self, size: ImageSize, limits: AreaLimits, info: ModelInfo) -> ImageSize:
        return smart_resize(size, info.vision.factor, limits)

    def frame_size(
        self, size: ImageSize, num_frames: int, limits: AreaLimits, max_total_pixels: int, info: ModelInfo
    ) -> ImageSize:  # fmt: skip
        """The limits of a frame narrow those of the whole video, which are the checkpoint's."""
        video, patch = info.video, info.vision.temporal_patch_size
        assert isinstance(video, Qwen3VideoInfo)
        high, low = max_total_pixels, video.min_total_pixels
        if video.capped_frame_pixels is not None:
            share = min(video.capped_frame_pixels, high // num_frames)
            high = num_frames * max(share, int(low * 1.05))
        # `resize_video` compares the area of the rounded number of frames, and resizes by that of all.
        rounded = round(num_frames / patch) * patch
        high = min(high, min(num_frames, rounded) * limits.max_pixels)
        low = min(max(low, max(num_frames, rounded) * limits.min_pixels), high)
        return resize_video(size, num_frames, info.vision, AreaLimits(low, high))

    def sample_frames(
        self,
        num_source_frames: int,
        source_fps: float,
        fps: float,
        min_frames: int,
        max_frames: int,
        info: ModelInfo,
    ) -> list[int]:
        """As transformers' Qwen3-VL video processor has it (`sample_frames`), rounding half to even."""
        total = num_source_frames
        count = int(min(max(total / source_fps * fps, min_frames), max_frames, total))
        return [int(number) for number in np.linspace(0, total - 1, count).round()]

    def segments(self, media: MediaInfo, info: ModelInfo) -> tuple[Segment, ...]:
        if media.frames is None:
            return (Placeholders(info.vision.num_tokens(media.grid_thw)),)
        of_frame = Placeholders(info.vision.num_tokens(media.grid_thw._replace(t=1)))
        parts: list[Segment] = [] if KEEPS_OUTER_MARKS else [WithoutMarks(VISION_START, VISION_END)]
        for time in patch_times(media.frames, info.vision.temporal_patch_size):
            parts += [f"<{time:.1f} seconds>{VISION_START}", of_frame, VISION_END]
        return tuple(parts)

    def positions(self, num_tokens: int, items: Sequence[PlacedMedia], info: ModelInfo) -> Positions:
        """Each frame of a video is a run by itself; the text between two of them counts on."""
        runs: list[Run] = []
        for media, spans in items:
            grid = merged_grid(media.grid_thw, info.vision.merge_size)
            if media.frames is not None:
                grid = grid._replace(t=1)
            runs += [Run(span, grid) for span in spans]
        return mrope_positions(num_tokens, runs)


class Qwen3VLMoe(Qwen3VL):
    model_type = "qwen3_vl_moe"

    def read_experts(self, files: CheckpointFiles) -> ExpertsInfo | None:
        text = files.text
        step, dense = int(text.get("decoder_sparse_step") or 1), text.get("mlp_only_layers") or ()
        numbers = range(files.integer(text, "num_hidden_layers"))
        key = "num_experts" if text.get("num_experts") is not None else "num_local_experts"
        num_experts, num_chosen = files.integer(text, key), files.integer(text, "num_experts_per_tok")
        layers = tuple(number for number in numbers if number not in dense and (number + 1) % step == 0)
        return make_experts(files, num_experts, num_chosen, layers)


FAMILIES = (Qwen3VL(), Qwen3VLMoe())


def make_experts(
    files: CheckpointFiles, num_experts: int, num_chosen: int, layers: tuple[int, ...]
) -> ExpertsInfo:  # fmt: skip
    """Raises ValueError where a token cannot choose so many experts."""
    if not 1 <= num_chosen <= num_experts:
        what = f"has num_experts_per_tok = {num_chosen} of {num_experts} experts"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    return ExpertsInfo(
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=files.integer(files.text, "moe_intermediate_size"),
        layers=layers,
    )


def resize_video(size: ImageSize, num_frames: int, vision: VisionInfo, limits: AreaLimits) -> ImageSize:
    """The size of each frame, so that the area of all frames together is within the limits.

    As `smart_resize` of transformers' Qwen3-VL video processor. Raises ValueError for what it refuses: fewer
    frames than a temporal patch has, and an aspect ratio above 200.
    """
    factor, patch = vision.factor, vision.temporal_patch_size
    if num_frames < patch:
        raise ValueError(f"a video of this model has at least {patch} frames, this one has {num_frames}")
    height, width = size
    if min(size) < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"the sides of a frame may differ by a factor of {MAX_ASPECT_RATIO} at most")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    area = round(num_frames / patch) * patch * rows * columns
    if area > limits.max_pixels:
        shrink = math.sqrt(num_frames * height * width / limits.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif area < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (num_frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return ImageSize(rows, columns)


def _read_text(files: CheckpointFiles, vision: Qwen3VisionInfo, experts: ExpertsInfo | None) -> Qwen3TextInfo:
    text, rope = files.text, files.rope
    files.expect(text, "attention_bias", False)
    files.expect(rope, "mrope_interleaved", True)
    # The classes of transformers have another number than the published files.
    files.need(text, "head_dim")
    if rope.get("rope_theta") is None:
        files.need(text, "rope_theta")
    num_features = len(vision.deepstack_layers)
    info = read_text(files, partial(Qwen3TextInfo, num_features=num_features, experts=experts))
    if vision.embedding_width != (1 + num_features) * info.hidden_size:
        what = f"has vision embeddings of {vision.embedding_width} numbers, with {num_features} layers of"
        raise ValueError(f"model {str(files.folder)!r} {what} deepstack; the text has {info.hidden_size}")
    if num_features > info.num_layers:
        raise ValueError(f"model {str(files.folder)!r} has fewer layers than deepstack adds to")
    return info


def _read_vision(files: CheckpointFiles) -> Qwen3VisionInfo:
    vision = files.vision
    layers = tuple(map(int, files.need(vision, "deepstack_visual_indexes")))
    if len(set(layers)) < len(layers) or not set(layers) <= set(range(files.integer(vision, "depth"))):
        what = f"has deepstack_visual_indexes = {list(layers)}, which are not layers of the tower"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    return read_tower(files, layers)


def read_tower(files: CheckpointFiles, layers: tuple[int, ...]) -> Qwen3VisionInfo:
    """`layers`: those with deepstack."""
    vision = files.vision
    files.expect(vision, "hidden_act", "gelu_pytorch_tanh")
    sizes = TowerSizes(
        embed_dim=files.integer(vision, "hidden_size"),
        intermediate_size=files.integer(vision, "intermediate_size"),
        embedding_width=(1 + len(layers)) * files.integer(vision, "out_hidden_size"),
    )
    num_positions = files.integer(vision, "num_position_embeddings")
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        what = f"has num_position_embeddings = {num_positions}, which is no square"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    make = partial(Qwen3VisionInfo, position_side=side, deepstack_layers=layers)
    # The class of the processor has the mean, deviation and limits of another family.
    return read_vision(files, make, sizes, None)


def read_video(files: CheckpointFiles, vision: Qwen3VisionInfo) -> Qwen3VideoInfo:
    """As transformers reads it: a file of its own, else the pictures' limits."""
    processor = files.video_processor
    # `min_pixels` and `max_pixels` in the file of videos mean nothing to transformers' class.
    low, high = pixel_limits({"size": processor.get("size")} if processor else files.processor)
    files.expect(processor, "do_sample_frames", True)
    files.expect(processor, "num_frames", None)
    if not low or not high:
        # 128 and 768 tokens of all frames in transformers' class, 4 and 24576 in the published files.
        files.need(processor, "size")
    capped = int(processor.get("max_video_tokens") or 768) * vision.factor**2
    return Qwen3VideoInfo(
        fps=float(processor.get("fps") or 2.0),
        min_frames=int(processor.get("min_frames") or 4),
        max_frames=int(processor.get("max_frames") or 768),
        min_pixels=1,
        max_pixels=min(high // vision.temporal_patch_size, vision.max_pixels),
        max_total_pixels=high,
        min_total_pixels=low,
        capped_frame_pixels=capped if processor.get("cap_pixels_per_frame") else None,
    )
