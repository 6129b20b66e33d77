"""Videos as the video processors of Hugging Face see them: which frames, at which size, as which patches.

The processors want torchvision, of which there is no build for every torch. Their rules are taken from their
classes; resizing itself is what torchvision calls.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from tests.chats import Clip, FrameList, Video
from workers.preprocess.video_files import open_video

CLASSES = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}
MODULES = {  # of families that have another one's
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
}


class SeenVideo(NamedTuple):
    patches: torch.Tensor  # [patches, numbers of a patch] float32
    grid: tuple[int, int, int]  # of patches
    metadata: VideoMetadata  # as Hugging Face's processors of prompts ask for it
    sampled_fps: float


def video_processing(family: str = "qwen2_vl") -> Any:
    """The module of Hugging Face's video processor."""
    modules = {
        name: ModuleType(name)
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    }
    modules["torchvision.transforms.v2.functional"] = mock.MagicMock()
    with mock.patch.dict(sys.modules, modules):
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")


def sample_frames(total: int, rate: float, fps: float, max_frames: int) -> list[int]:
    """Hugging Face's choice of frames for Qwen2-VL and Qwen2.5-VL."""
    of = SimpleNamespace(num_frames=None)
    metadata = SimpleNamespace(total_num_frames=total, fps=rate)
    found = video_processing().Qwen2VLVideoProcessor.sample_frames(
        of, metadata, temporal_patch_size=2, min_frames=4, max_frames=max_frames, fps=fps
    )
    return [min(index, total - 1) for index in found.tolist()]


class VideoReference:
    """A family's video processor with the settings of a checkpoint's folder."""

    def __init__(self, folder: Path, family: str, pictures: Any) -> None:
        """`pictures`: the processor of pictures, whose settings hold where videos have no file of theirs."""
        self.family = MODULES.get(family, family)
        self._module = video_processing(self.family)
        self._class = getattr(self._module, CLASSES[self.family])
        # Its constructor asks for torchvision.
        self.processor = object.__new__(self._class)
        settings = {
            name: getattr(pictures, name)
            for name in ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
        }
        path = folder / "video_preprocessor_config.json"
        own = json.loads(path.read_text()) if path.is_file() else {}
        size = own.get("size") or {
            "shortest_edge": pictures.size["shortest_edge"],
            # Qwen's own code has no larger frames, whatever pictures may have.
            "longest_edge": min(pictures.size["longest_edge"], 768 * 28 * 28),
        }
        # Qwen2-VL's frames are smaller where there are many: transformers does that on demand only.
        capped = own.get("cap_pixels_per_frame") or self.family == "qwen2_vl"
        vars(self.processor).update({**settings, **own, "size": size, "cap_pixels_per_frame": capped})

    def see(self, video: Video) -> SeenVideo:
        frames, metadata, sampled_fps = self._frames(video)
        processor = self.processor
        with mock.patch.object(self._module.BaseVideoProcessor, "resize", _resize):
            resized = processor.resize(
                torch.from_numpy(frames).permute(0, 3, 1, 2)[None],
                SimpleNamespace(**processor.size),
                None,
                factor=processor.patch_size * processor.merge_size,
                temporal_factor=processor.temporal_patch_size,
                cap_pixels_per_frame=processor.cap_pixels_per_frame,
            )
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        patches, *grid = processor.patchify(
            (resized.float() / 255 - mean) / std,
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
        )
        return SeenVideo(patches[0], tuple(grid), metadata, sampled_fps)

    def _frames(self, video: Video) -> tuple[np.ndarray, VideoMetadata, float]:
        """Frames [count, height, width, 3] uint8, when they were taken, how many there are a second."""
        if isinstance(video, Clip):
            with tempfile.NamedTemporaryFile() as file:
                Path(file.name).write_bytes(video.data)
                opened = open_video(file.name, "pyav", 10**7)
                total, rate, _, _ = msgspec.structs.astuple(opened.metadata)
                numbers = self._sample(total, rate, video.fps)
                frames = np.stack(list(opened.frames(numbers)))
            metadata = VideoMetadata(total_num_frames=total, fps=rate, frames_indices=numbers)
            return frames, metadata, metadata.sampled_fps
        listed = video if isinstance(video, FrameList) else FrameList(video)
        frames = np.stack([np.asarray(frame) for frame in listed.frames])
        count = len(frames)
        if (times := listed.timestamps) is not None:
            # A frame's time is its index over the rate.
            metadata = VideoMetadata(total_num_frames=count, fps=1.0, frames_indices=list(times))
            return frames, metadata, (count - 1) / (times[-1] - times[0])
        metadata = VideoMetadata(total_num_frames=count, fps=listed.fps, frames_indices=list(range(count)))
        return frames, metadata, metadata.sampled_fps

    def _sample(self, total: int, rate: float, fps: float) -> list[int]:
        if self.family == "qwen2_vl":
            return sample_frames(total, rate, fps, 768)
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        return [int(index) for index in self.processor.sample_frames(metadata, fps=fps)]


def _resize(self: object, image: torch.Tensor, size: Any, resample: object) -> torch.Tensor:
    """What torchvision's resize calls for tensors of bytes."""
    frames = torch.nn.functional.interpolate(
        image[0], (size.height, size.width), mode="bicubic", antialias=True
    )
    return frames[None]
