"""The tower's numbers and the processor of pictures: the families of Qwen share this."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from pipeline.families.base import VisionInfo
from pipeline.families.files import CheckpointFiles, pixel_limits

Info = TypeVar("Info", bound=VisionInfo)
BICUBIC = 3  # Pillow's number
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PictureDefaults(NamedTuple):
    """What a processor may leave unsaid: transformers' class and the published files agree on it."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_pixels: int


class TowerSizes(NamedTuple):
    """Numbers that each family has under names of its own."""

    embed_dim: int
    intermediate_size: int
    embedding_width: int


def read_vision(
    files: CheckpointFiles, make: Callable[..., Info], sizes: TowerSizes, defaults: PictureDefaults | None
) -> Info:  # fmt: skip
    """The checkpoint's own numbers. `max_pixels` is 0 where it names none: see `with_server_limits`.

    `make` is a family's class of `VisionInfo`, which may have been given the family's own numbers. Raises
    ValueError for a missing key.
    """
    vision, processor = files.vision, files.processor
    low, high = pixel_limits(processor)
    if defaults is None:
        defaults = PictureDefaults(
            files.need(processor, "image_mean"), files.need(processor, "image_std"), low
        )
        if not low:
            files.need(processor, "size")
    _expect_one_patch_size(files)
    _expect_usual_steps(files)
    return make(
        depth=_first(files, "depth", "num_hidden_layers"),
        embed_dim=sizes.embed_dim,
        num_heads=_first(files, "num_heads", "num_attention_heads"),
        intermediate_size=sizes.intermediate_size,
        embedding_width=sizes.embedding_width,
        patch_size=_first(files, "patch_size", "spatial_patch_size"),
        merge_size=files.integer(vision, "spatial_merge_size"),
        temporal_patch_size=_temporal_patch_size(files),
        image_mean=tuple(processor.get("image_mean") or defaults.mean),
        image_std=tuple(processor.get("image_std") or defaults.std),
        min_pixels=low or defaults.min_pixels,
        max_pixels=high,
    )


def with_server_limits(
    files: CheckpointFiles, vision: Info, min_pixels: int | None, max_pixels: int | None
) -> Info:  # fmt: skip
    """Raises ValueError where neither the checkpoint nor the server limits the area of a picture."""
    if not vision.max_pixels and max_pixels is None:
        # 1280 tokens in transformers' class, 16384 in the published files.
        files.need(files.processor, "max_pixels")
    return vision.with_pixel_limits(min_pixels, max_pixels)


def _first(files: CheckpointFiles, *names: str) -> int:
    """A number of the tower under one of its spellings; refused under the first."""
    name = next((name for name in names if files.vision.get(name) is not None), names[0])
    return files.integer(files.vision, name)


def _temporal_patch_size(files: CheckpointFiles) -> int:
    is_said = files.vision.get("temporal_patch_size") is not None
    return files.integer(files.vision, "temporal_patch_size") if is_said else 2


def _expect_one_patch_size(files: CheckpointFiles) -> None:
    """The processor cuts the patches that the tower takes."""
    for name, of_tower in (
        ("patch_size", _first(files, "patch_size", "spatial_patch_size")),
        ("merge_size", files.integer(files.vision, "spatial_merge_size")),
        ("temporal_patch_size", _temporal_patch_size(files)),
    ):
        for processor in (files.processor, files.video_processor):
            files.expect(processor, name, of_tower)


def _expect_usual_steps(files: CheckpointFiles) -> None:
    """Pictures and frames are resized, divided by 255 and normalised alike: nothing else is computed."""
    for name in ("in_channels", "in_chans"):
        files.expect(files.vision, name, 3)
    for processor in (files.processor, files.video_processor):
        for name in ("do_resize", "do_rescale", "do_normalize"):
            files.expect(processor, name, True)
        files.expect(processor, "resample", BICUBIC)
        scale = processor.get("rescale_factor")
        if scale is not None and not math.isclose(scale, 1 / 255):
            files.expect(processor, "rescale_factor", 1 / 255)
    for name in ("image_mean", "image_std"):
        if files.processor.get(name) is not None:
            files.expect(files.video_processor, name, files.processor[name])
