"""Videos: files of them, which frames the model sees, and how large."""

from __future__ import annotations

import itertools
import math
import os
import weakref

import numpy as np
import numpy.typing as npt

from workers.preprocess.images import ImageSize, smart_resize
from workers.preprocess.video import VideoMetadata

_numbers = itertools.count()
TORCH_LANES = 8


class VideoFile:
    """A video on disk, open and mostly without a name; closed with the last who holds it. `digest` is the sha256 of its content."""

    def __init__(self, fd: int, nbytes: int, digest: bytes) -> None:
        self.nbytes, self.digest = nbytes, digest
        self.number = next(_numbers)
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        weakref.finalize(self, os.close, fd)


def sample_frames(metadata: VideoMetadata, fps: float, min_frames: int, max_frames: int, multiple: int) -> list[int]:
    """Evenly spread frame numbers, about `fps` a second, as many as a multiple of `multiple`.

    As transformers' Qwen2-VL video processor has it (`sample_frames`), rounding included; a video of fewer
    frames than `multiple` is seen whole.
    """
    total = metadata.num_frames
    if total < multiple:
        return list(range(total))
    most = min(max_frames, total) // multiple * multiple
    wanted = int(min(max(total / metadata.fps * fps, min_frames), most)) // multiple * multiple
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


def frame_size(size: ImageSize, num_frames: int, min_pixels: int, max_pixels: int, max_total_pixels: int, factor: int) -> ImageSize:
    """Of each frame as the model sees it, smaller where there are many (`cap_pixels_per_frame` of Qwen2-VL's video processor)."""
    high = min(max_pixels, max(max_total_pixels // num_frames, int(min_pixels * 1.05)))
    return smart_resize(size, factor, min(min_pixels, high), high)
