"""When the frames of a video were taken."""

from __future__ import annotations

from pipeline.families.base import SampledFrames

# Of frames of which nobody says when they were taken. transformers assumes this.
ASSUMED_FPS = 24.0


def frame_times(frames: SampledFrames) -> list[float]:
    """Seconds in the source at which each sampled frame is shown."""
    if frames.times is not None:
        return list(frames.times)
    fps = frames.source_fps or ASSUMED_FPS
    return [number / fps for number in frames.numbers]


def sampled_fps(frames: SampledFrames) -> float:
    """How many sampled frames there are a second, on average, as transformers reckons."""
    if frames.times is not None and len(frames.times) > 1:
        return (len(frames.times) - 1) / (frames.times[-1] - frames.times[0])
    if frames.source_fps is None:
        return ASSUMED_FPS
    return len(frames.numbers) / frames.num_source_frames * frames.source_fps


def patch_times(frames: SampledFrames, temporal_patch_size: int) -> list[float]:
    """The time of each temporal patch: the mean of its first and its last frame, as in transformers.

    The last frame stands for those that the last patch lacks.
    """
    times = frame_times(frames)
    times += [times[-1]] * (-len(times) % temporal_patch_size)
    size = temporal_patch_size
    return [(times[first] + times[first + size - 1]) / 2 for first in range(0, len(times), size)]
