"""From a part's settings to the size of its picture or video and its sampled frames. Pure.

Settings have the names and rules of Qwen's own code (qwen-vl-utils, `vision_process.py`); the family computes
sizes and frames (`pipeline.families`). A bound looser than the server's is cut to the server's, since clients
send their own defaults. A senseless value is refused with its name. All functions but `check_settings` take a
part that has passed it; they raise RequestError, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pipeline.families import MAX_ASPECT_RATIO, AreaLimits, ImageSize, ModelInfo, SampledFrames
from pipeline.wire.errors import RequestError, shown
from pipeline.wire.prompts import ImagePart, VideoPart
from workers.preprocess.video import VideoMetadata

MAX_SIDE = 1 << 20  # of a requested size
MAX_DURATION_S = 1e7  # of a video: where positions count time, they stay whole numbers of 32 bits
MAX_TIME_S = 1e11  # of a frame
MIN_TOKENS = 4  # of a picture of a requested size, as in qwen-vl-utils
# Meaningless for a list of frames, which are all used.
OF_FRAMES = ("nframes", "video_start", "video_end")
OF_TIME = ("fps", "timestamps")  # of the frames in a list
OF_SIZE = ("min_pixels", "max_pixels", "resized_height", "resized_width")


def check_settings(part: ImagePart | VideoPart, info: ModelInfo, max_frames: int, field: str) -> None:
    """Raises RequestError for settings that are senseless for any media, before media are fetched.

    `max_frames` is the server's limit of frames.
    """
    vision, video = info.vision, info.video
    limits = vision if isinstance(part, ImagePart) else video
    _asked_size(part, info, limits.max_pixels, field)
    _area_limits(part, limits.min_pixels, limits.max_pixels, field)
    if isinstance(part, ImagePart):
        return
    for name in ("total_pixels", "nframes"):
        _at_least(1, getattr(part, name), name, field)
    _frame_limits(part, video.min_frames, max_frames, vision.temporal_patch_size, field)
    _check_window(part, field)
    if part.frames:
        _check_frame_list(part, info, max_frames, field)
    elif part.timestamps is not None:
        raise RequestError("timestamps are those of a list of frames", field=f"{field}.timestamps")


def picture_size(part: ImagePart, size: ImageSize, info: ModelInfo, field: str) -> ImageSize:
    """The size to which a picture is resized."""
    vision = info.vision
    asked = _asked_size(part, info, vision.max_pixels, field)
    limits = _area_limits(part, vision.min_pixels, vision.max_pixels, field)
    return asked or info.family.picture_size(size, limits, info)


def video_frame_size(
    part: VideoPart, size: ImageSize, num_frames: int, info: ModelInfo, field: str
) -> ImageSize:  # fmt: skip
    """The size to which each frame is resized, so that all frames together have at most `total_pixels`."""
    video = info.video
    asked = _asked_size(part, info, video.max_pixels, field)
    limits = _area_limits(part, video.min_pixels, video.max_pixels, field)
    total = video.max_total_pixels
    if part.total_pixels is not None:
        total = min(total, part.total_pixels * info.vision.temporal_patch_size)  # frames are merged in pairs
    try:
        # Asked for in any case: the family may refuse the video.
        usual = info.family.frame_size(size, num_frames, limits, total, info)
    except ValueError as refusal:
        raise RequestError(str(refusal), field=field) from None
    return asked or usual


def chosen_frames(
    part: VideoPart, metadata: VideoMetadata, info: ModelInfo, max_frames: int, field: str
) -> SampledFrames:  # fmt: skip
    """The frames that are seen, at most `max_frames`."""
    multiple = info.vision.temporal_patch_size
    low, high = _frame_limits(part, info.video.min_frames, max_frames, multiple, field)
    start, end = frame_range(part, metadata, field)
    window, rate = end - start, metadata.fps
    _check_duration(window / rate, field)
    if part.nframes is None:
        fps = info.video.fps if part.fps is None else part.fps
        numbers = info.family.sample_frames(window, rate, fps, low, high, info)
    else:
        count = _whole_number_of_frames(part.nframes, window, max_frames, multiple, field)
        # Every frame: the rate is the video's own, and both limits are the count.
        numbers = info.family.sample_frames(window, rate, rate, count, count, info)[:count]
    return SampledFrames(tuple(start + number for number in numbers), window, rate)


def frame_range(part: VideoPart, metadata: VideoMetadata, field: str) -> tuple[int, int]:
    """The first frame of the requested window of time, and the one after its last.

    As `calculate_video_frame_range` of qwen-vl-utils.
    """
    total, fps = metadata.num_frames, metadata.fps
    if part.video_start is None and part.video_end is None:
        return 0, total
    duration = total / fps
    start = 0 if part.video_start is None else math.ceil(min(part.video_start, duration) * fps)
    last = total - 1
    if part.video_end is not None:
        last = min(math.floor(min(part.video_end, duration) * fps), last)
    if start >= last:
        name = "video_start" if part.video_start is not None else "video_end"
        what = (
            f"between video_start and video_end are no two frames: the video has {total}, in {duration:.2f} s"
        )
        raise RequestError(what, field=f"{field}.{name}")
    return start, last + 1


def _check_window(part: VideoPart, field: str) -> None:
    for name in ("video_start", "video_end"):
        seconds = getattr(part, name)
        if seconds is not None and not 0 <= seconds < math.inf:
            what = f"{name} must be 0 seconds or more, got {shown(seconds)}"
            raise RequestError(what, field=f"{field}.{name}")
    if part.video_start is not None and part.video_end is not None and part.video_start >= part.video_end:
        what = f"video_start must be before video_end, got {part.video_start} and {part.video_end}"
        raise RequestError(what, field=f"{field}.video_start")


def _check_frame_list(part: VideoPart, info: ModelInfo, max_frames: int, field: str) -> None:
    """Checks a video given as a list of pictures. Times are accepted where the family uses them."""
    for name in OF_FRAMES if info.family.has_frame_times else (*OF_TIME, *OF_FRAMES):
        if getattr(part, name) is not None:
            what = f"{name} does not apply to a list of frames: all of them are seen"
            raise RequestError(what, field=f"{field}.{name}")
    if part.timestamps is not None:
        _check_timestamps(part, part.timestamps, field)
    if part.uuid or any(_is_any_given(frame, OF_SIZE) for frame in part.frames):
        what = "a list of frames has no uuid, and its limits of size are those of the video"
        raise RequestError(what, field=field)
    count = len(part.frames)
    if part.fps is not None:
        _check_duration(count / part.fps, f"{field}.fps")
    low, high = _frame_limits(part, 1, max_frames, info.vision.temporal_patch_size, field)
    if count > high:
        raise RequestError(f"the video has {count} frames, the limit is {high}", field=field)
    if part.min_frames is not None and count < low:
        raise RequestError(f"the video has {count} frames, min_frames is {low}", field=f"{field}.min_frames")


def _check_timestamps(part: VideoPart, times: Sequence[float], field: str) -> None:
    field = f"{field}.timestamps"
    if part.fps is not None:
        raise RequestError("fps and timestamps exclude each other", field=field)
    if len(times) != len(part.frames):
        what = f"there are {len(times)} timestamps for {len(part.frames)} frames"
        raise RequestError(what, field=field)
    if not all(0 <= time <= MAX_TIME_S for time in times):
        raise RequestError(f"timestamps must be between 0 and {MAX_TIME_S:.0f} seconds", field=field)
    if any(later <= earlier for earlier, later in itertools.pairwise(times)):
        raise RequestError("each of the timestamps must be after the one before", field=field)
    _check_duration(times[-1] - times[0], field)


def _check_duration(seconds: float, field: str) -> None:
    if not seconds <= MAX_DURATION_S:
        raise RequestError(f"a video lasts at most {MAX_DURATION_S:.0f} seconds", field=field)


def _asked_size(
    part: ImagePart | VideoPart, info: ModelInfo, max_pixels: int, field: str
) -> ImageSize | None:  # fmt: skip
    """The size that a part requests, rounded to the model's factor. It takes precedence over an area."""
    sides = part.resized_height, part.resized_width
    if sides == (None, None):
        return None
    for name, side in zip(("resized_height", "resized_width"), sides, strict=True):
        if side is None:
            raise RequestError("resized_height and resized_width go together", field=f"{field}.{name}")
        if not 1 <= side <= MAX_SIDE:
            what = f"{name} must be between 1 and {MAX_SIDE} pixels, got {shown(side)}"
            raise RequestError(what, field=f"{field}.{name}")
    factor = info.vision.factor
    height, width = (max(side, factor) for side in sides if side is not None)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        what = f"resized_height and resized_width may differ by a factor of {MAX_ASPECT_RATIO} at most"
        raise RequestError(what, field=f"{field}.resized_height")
    limits = AreaLimits(min(MIN_TOKENS * factor**2, max_pixels), max_pixels)
    return info.family.picture_size(ImageSize(height, width), limits, info)


def _area_limits(part: ImagePart | VideoPart, low: int, high: int, field: str) -> AreaLimits:
    """The smallest and the largest area, in pixels. `low` and `high` are the server's."""
    for name in ("min_pixels", "max_pixels"):
        _at_least(1, getattr(part, name), name, field)
    min_pixels, max_pixels = part.min_pixels, part.max_pixels
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        what = f"min_pixels must be at most max_pixels, got {min_pixels} and {max_pixels}"
        raise RequestError(what, field=f"{field}.min_pixels")
    if min_pixels is not None and min_pixels > high:
        what = f"min_pixels must be at most the server's {high}, got {min_pixels}"
        raise RequestError(what, field=f"{field}.min_pixels")
    high = high if max_pixels is None else min(high, max_pixels)
    # A smaller area than the server's smallest is allowed, if requested: it costs less.
    return AreaLimits(min(low if min_pixels is None else max(low, min_pixels), high), high)


def _frame_limits(part: VideoPart, low: int, max_frames: int, multiple: int, field: str) -> tuple[int, int]:
    """The smallest and the largest number of frames. `low` is the model's, `max_frames` the server's."""
    if part.fps is not None and not 0 < part.fps < math.inf:
        raise RequestError(f"fps must be above 0, got {shown(part.fps)}", field=f"{field}.fps")
    if part.fps is not None and part.nframes is not None:
        raise RequestError("fps and nframes exclude each other", field=f"{field}.nframes")
    _at_least(1, part.min_frames, "min_frames", field)
    _at_least(multiple, part.max_frames, "max_frames", field)
    if part.min_frames is not None:
        low = math.ceil(part.min_frames / multiple) * multiple
    if part.max_frames is not None:
        if part.min_frames is not None and part.min_frames > part.max_frames:
            what = f"min_frames must be at most max_frames, got {part.min_frames} and {part.max_frames}"
            raise RequestError(what, field=f"{field}.min_frames")
        max_frames = min(max_frames, part.max_frames)
    return low, max_frames


def _whole_number_of_frames(asked: int, total: int, max_frames: int, multiple: int, field: str) -> int:
    count = round(asked / multiple) * multiple
    high = min(total, max_frames)
    if not multiple <= count <= high:
        limits = f"between {multiple} and {high} (the video has {total} frames)"
        raise RequestError(f"nframes must be {limits}, got {shown(asked)}", field=f"{field}.nframes")
    return count


def _at_least(limit: int, value: int | None, name: str, field: str) -> None:
    if value is not None and value < limit:
        raise RequestError(f"{name} must be at least {limit}, got {shown(value)}", field=f"{field}.{name}")


def _is_any_given(part: ImagePart, names: Sequence[str]) -> bool:
    return any(getattr(part, name) is not None for name in names)
