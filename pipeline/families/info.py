"""Puts together what a family has read, with what all families read alike."""

from __future__ import annotations

from pipeline.families.base import Family, ModelInfo, TextInfo, VideoInfo, VisionInfo
from pipeline.families.files import CheckpointFiles


def model_info(
    family: Family,
    files: CheckpointFiles,
    text: TextInfo,
    vision: VisionInfo,
    video: VideoInfo,
    eos_token_ids: tuple[int, ...] | None = None,
) -> ModelInfo:
    """`eos_token_ids`: where they are not those of generation alone. Raises ValueError where the checkpoint
    does not say which tokens stand for media."""
    return ModelInfo(
        family=family,
        folder=files.folder,
        text=text,
        vision=vision,
        video=video,
        image_token_id=files.integer(files.config, "image_token_id"),
        video_token_id=files.integer(files.config, "video_token_id"),
        eos_token_ids=files.eos_token_ids() if eos_token_ids is None else eos_token_ids,
        default_sampling=files.default_sampling(),
    )
