"""A family of our own invention, as another package would bring it: three files and an entry point.

It differs from the families that are served wherever a family may: sides are multiples of 30, a frame is a
temporal patch by itself, an item is two runs of placeholders with text between them, and the positions of a
video's tokens tell how much time lies between its frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.families import (
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
from pipeline.families.files import CheckpointFiles, Section
from pipeline.families.resizing import smart_resize
from pipeline.wire.base import GridTHW

BETWEEN = "<|vision_end|> and <|vision_start|>"  # the two runs of an item
POSITIONS_A_SECOND = 4
# Checkpoints of this family are of two kinds, which nothing but the chat template tells apart.
PLAIN, THOUGHTS = "none", "toy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTextInfo(TextInfo):
    has_memory: bool  # whether a layer keeps a state


class ToyFamily(Family):
    model_type = "toy_vl"
    tower = "tests.toy_family.tower"
    decoder = "tests.toy_family.decoder"
    has_frame_times = True

    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        files = CheckpointFiles(folder)
        vision = _read_vision(files, files.need(files.config, "eye")).with_pixel_limits(
            min_pixels, max_pixels
        )
        return ModelInfo(
            family=self,
            folder=folder,
            text=_read_text(files, files.need(files.config, "language")),
            vision=vision,
            video=VideoInfo(
                fps=2.0,
                min_frames=1,
                max_frames=64,
                min_pixels=vision.min_pixels,
                max_pixels=vision.max_pixels,
                max_total_pixels=64 * vision.max_pixels,
            ),
            image_token_id=files.integer(files.config, "picture_token_id"),
            video_token_id=files.integer(files.config, "video_token_id"),
            eos_token_ids=files.eos_token_ids(),
            default_sampling={},
            reasoning_parser=THOUGHTS if "<think>" in files.chat_template else PLAIN,
        )

    def picture_size(self, size: ImageSize, limits: AreaLimits, info: ModelInfo) -> ImageSize:
        return smart_resize(size, info.vision.factor, limits)

    def frame_size(
        self, size: ImageSize, num_frames: int, limits: AreaLimits, max_total_pixels: int, info: ModelInfo
    ) -> ImageSize:  # fmt: skip
        high = max(limits.min_pixels, min(limits.max_pixels, max_total_pixels // num_frames))
        return smart_resize(size, info.vision.factor, AreaLimits(limits.min_pixels, high))

    def sample_frames(
        self,
        num_source_frames: int,
        source_fps: float,
        fps: float,
        min_frames: int,
        max_frames: int,
        info: ModelInfo,
    ) -> list[int]:
        wanted = max(min_frames, round(num_source_frames / source_fps * fps), 1)
        count = min(wanted, max_frames, num_source_frames)
        return [number * num_source_frames // count for number in range(count)]

    def chunk_length(self, grid: GridTHW, num_vits: int, info: ModelInfo) -> int:
        """So short that a chunk's tokens are in both runs."""
        return min(2, super().chunk_length(grid, num_vits, info))

    def segments(self, media: MediaInfo, info: ModelInfo) -> tuple[Segment, ...]:
        """The first half of the rows of tokens of all frames, and the other half."""
        num_columns = media.grid_thw.w // info.vision.merge_size
        num_rows = info.vision.num_tokens(media.grid_thw) // num_columns
        num_first = -(-num_rows // 2)
        runs = [Placeholders(count * num_columns) for count in (num_first, num_rows - num_first) if count]
        return (runs[0], BETWEEN, runs[1]) if len(runs) == 2 else (runs[0],)

    def positions(self, num_tokens: int, items: Sequence[PlacedMedia], info: ModelInfo) -> Positions:
        """Each run begins where the text before it ended, and the text goes on behind its largest position.

        Time counts from the first frame of a run; rows and columns from the top left.
        """
        rows = np.empty((3, num_tokens), dtype=np.int32)
        index = position = 0
        for media, spans in items:
            grid, merge = media.grid_thw, info.vision.merge_size
            places = np.indices((grid.t, grid.h // merge, grid.w // merge)).reshape(3, -1)
            places[0] *= time_step(media)
            start = 0  # of the run, among the item's tokens
            for span in spans:
                rows[:, index : span.offset] = np.arange(position, position + span.offset - index)
                run = places[:, start : start + span.length].copy()
                run[0] -= run[0, 0]
                run += position + span.offset - index
                rows[:, span.offset : span.stop] = run
                index, position, start = span.stop, int(run.max()) + 1, start + span.length
        rows[:, index:] = np.arange(position, position + num_tokens - index)
        return Positions(rows, position - index)

    def kv_hash(self, mm_hash: bytes, media: MediaInfo, info: ModelInfo) -> bytes:
        """Time is in the positions, and in no pixel."""
        return hashlib.sha256(mm_hash + b"%d" % time_step(media)).digest()


def time_step(media: MediaInfo) -> int:
    """Positions between two frames."""
    frames = media.frames
    if frames is None or frames.source_fps is None or len(frames.numbers) < 2:
        return 1
    seconds = (frames.numbers[1] - frames.numbers[0]) / frames.source_fps
    return max(1, round(POSITIONS_A_SECOND * seconds))


def _read_text(files: CheckpointFiles, section: Section) -> ToyTextInfo:
    return ToyTextInfo(
        hidden_size=files.integer(section, "width"),
        intermediate_size=files.integer(section, "mlp_width"),
        num_layers=files.integer(section, "depth"),
        num_heads=files.integer(section, "heads"),
        num_kv_heads=files.integer(section, "kv_heads"),
        head_dim=files.integer(section, "head_dim"),
        vocab_size=files.integer(section, "vocab_size"),
        rms_norm_eps=1e-6,
        rope_theta=1000.0,
        max_position_embeddings=files.integer(section, "context"),
        tie_word_embeddings=False,
        has_memory=bool(files.need(section, "has_memory")),
    )


def _read_vision(files: CheckpointFiles, section: Section) -> VisionInfo:
    return VisionInfo(
        depth=files.integer(section, "depth"),
        embed_dim=files.integer(section, "width"),
        num_heads=files.integer(section, "heads"),
        intermediate_size=files.integer(section, "mlp_width"),
        embedding_width=files.integer(section, "embedding_width"),
        patch_size=files.integer(section, "patch"),
        merge_size=files.integer(section, "merge"),
        temporal_patch_size=1,
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.3, 0.2, 0.1),
        min_pixels=files.integer(section, "min_pixels"),
        max_pixels=files.integer(section, "max_pixels"),
    )
