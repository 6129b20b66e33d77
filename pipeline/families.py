"""What a checkpoint's own files say about it, without torch: read by preprocess, vit, llm and the client library.

Both layouts of `config.json` are understood: the flat one of the hub's Qwen2-VL folders and the nested one of transformers 5.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2_vl",)
MAX_ASPECT_RATIO = 200  # of a picture; Qwen2-VL's processor refuses thinner ones
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a frame
VIDEO_CHUNK_PATCHES = 1024  # a ViT packs several into one forward, and the first of them goes while others are still being decoded
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInfo:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """How videos are sampled, and the area of each frame."""

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    max_total_pixels: int  # of all frames together, so that long videos are seen in smaller frames


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInfo:
    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    hidden_size: int  # of the embeddings, as the LLM takes them
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of this."""
        return self.patch_size * self.merge_size

    @property
    def largest_pixels(self) -> int:
        """An upper bound on the pixels of a resized picture.

        Thin ones may pass `max_pixels`, since sides are rounded to `factor`: most so where a request wants at least `max_pixels`.
        """
        factor, ratio = self.factor, math.sqrt(MAX_ASPECT_RATIO)
        return math.ceil(self.max_pixels + factor * math.sqrt(self.max_pixels) * (ratio + 1 / ratio) + factor * factor)

    def with_pixel_limits(self, min_pixels: int | None, max_pixels: int | None) -> VisionInfo:
        """The same with the server's limits in place of the model's. Raises ValueError when they cross."""
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if low > high:
            raise ValueError(f"min_pixels {low} is above max_pixels {high}")
        return dataclasses.replace(self, min_pixels=low, max_pixels=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    family: str
    folder: Path
    text: TextInfo
    vision: VisionInfo
    video: VideoInfo
    image_token_id: int
    video_token_id: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float]  # the model's own temperature, top_p and so on

    @property
    def video_chunk_patches(self) -> int:
        """A video goes through the ViTs in pieces of so many patches, or of two frames if those have more: never more than a picture may."""
        return min(VIDEO_CHUNK_PATCHES, self.vision.max_pixels // self.vision.patch_size**2)

    @property
    def largest_pixel_bytes(self) -> int:
        """An upper bound on the pixels, in bytes, of what goes through a ViT as one."""
        vision = self.vision
        frame = dataclasses.replace(vision, max_pixels=self.video.max_pixels).largest_pixels
        piece = vision.temporal_patch_size * max(frame, self.video_chunk_patches * vision.patch_size**2)
        return 3 * max(vision.largest_pixels, piece)


def read_model_info(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ModelInfo:
    """Raises ValueError when the folder is no checkpoint of a known family. The limits replace the checkpoint's own."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {str(folder)!r} has no config.json")
    config = _read(folder / "config.json")
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ValueError(f"model {str(folder)!r} is of the family {family!r}; served are {', '.join(FAMILIES)}")
    text = config.get("text_config") or config
    vision = config["vision_config"]
    generation = _read(folder / "generation_config.json")
    processor = _read(folder / "preprocessor_config.json")
    low, high = _pixel_limits(processor)
    hidden_size, num_heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    rope = text.get("rope_parameters") or text.get("rope_scaling") or config.get("rope_scaling") or {}
    if (rope_type := rope.get("rope_type") or rope.get("type") or "default") not in ("default", "mrope"):
        raise ValueError(f"model {str(folder)!r} has rotary embeddings of the unknown type {rope_type!r}")
    if text.get("use_sliding_window") or config.get("use_sliding_window"):
        raise ValueError(f"model {str(folder)!r} uses a sliding attention window, which is not served")
    names = ("temperature", "top_p", "top_k", "min_p") if generation.get("do_sample") is not False else ()
    sampling = {name: generation[name] for name in (*names, "repetition_penalty") if generation.get(name) is not None}
    if not names:
        sampling["temperature"] = 0.0
    vision_info = VisionInfo(
        depth=int(vision["depth"]),
        embed_dim=int(vision["embed_dim"]),
        num_heads=int(vision["num_heads"]),
        mlp_ratio=float(vision["mlp_ratio"]),
        hidden_size=int(vision.get("hidden_size") or hidden_size),
        patch_size=int(vision["patch_size"]),
        merge_size=int(vision["spatial_merge_size"]),
        temporal_patch_size=int(vision.get("temporal_patch_size") or 2),
        image_mean=tuple(processor.get("image_mean") or CLIP_MEAN),
        image_std=tuple(processor.get("image_std") or CLIP_STD),
        min_pixels=low or 56 * 56,
        max_pixels=high or 28 * 28 * 1280,
    ).with_pixel_limits(min_pixels, max_pixels)
    return ModelInfo(
        family=family,
        folder=folder,
        video=_read_video_info(folder, processor, vision_info),
        text=TextInfo(
            hidden_size=hidden_size,
            intermediate_size=int(text["intermediate_size"]),
            num_layers=int(text["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
            head_dim=hidden_size // num_heads,
            vocab_size=int(text["vocab_size"]),
            rms_norm_eps=float(text["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or config.get("rope_theta") or 1_000_000.0),
            mrope_section=tuple(rope.get("mrope_section") or (16, 24, 24)),
            max_position_embeddings=int(text["max_position_embeddings"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        ),
        vision=vision_info,
        image_token_id=int(config["image_token_id"]),
        video_token_id=int(config["video_token_id"]),
        eos_token_ids=_as_ids(generation.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))),
        default_sampling=sampling,
    )


def _read_video_info(folder: Path, image_processor: dict[str, Any], vision: VisionInfo) -> VideoInfo:
    """As transformers reads it: a file of its own, else the pictures' limits, here below the largest frame of Qwen's own code."""
    processor = _read(folder / "video_preprocessor_config.json")
    low, high = _pixel_limits(processor or image_processor)
    high = min(high or VIDEO_MAX_PIXELS, vision.max_pixels, VIDEO_MAX_PIXELS if not processor else vision.max_pixels)
    return VideoInfo(
        fps=float(processor.get("fps") or 2.0),
        min_frames=int(processor.get("min_frames") or 4),
        max_frames=int(processor.get("max_frames") or 768),
        min_pixels=min(low or VIDEO_MIN_PIXELS, high),
        max_pixels=high,
        max_total_pixels=int(int(processor.get("max_video_tokens") or 128_000) * vision.factor**2 * 0.9) * vision.temporal_patch_size,
    )


def _pixel_limits(processor: Mapping[str, Any]) -> tuple[int, int]:
    """The least and the largest area of a processor's settings, 0 where they say none."""
    size = processor.get("size") or {}
    return (
        int(processor.get("min_pixels") or size.get("shortest_edge") or 0),
        int(processor.get("max_pixels") or size.get("longest_edge") or 0),
    )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
