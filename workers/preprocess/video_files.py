"""Opens a file of any kind as a video, with the chosen reader."""

from __future__ import annotations

from workers.preprocess.containers import HEAD_BYTES, animation_of, container_of
from workers.preprocess.video import Video, VideoBroken


def open_video(path: str, reader: str, max_pixels: int) -> Video:
    """`reader` is `pyav` or `decord`; a frame may have `max_pixels`.

    Raises VideoBroken, or a decoder's exception for broken data.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if (kind := animation_of(head)) is not None:
        from workers.preprocess.animation import Animation

        return Animation(path, kind, max_pixels)
    if (container := container_of(head)) is None:
        raise VideoBroken("the media is not a video that can be decoded")
    if reader == "decord":
        from workers.preprocess.decord_video import DecordVideo

        return DecordVideo(path, max_pixels)
    from workers.preprocess.av_video import AvVideo

    return AvVideo(path, container, max_pixels)
