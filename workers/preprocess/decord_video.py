"""Videos by decord (`--video-reader decord`).

decord returns the right frames of mp4, Matroska, WebM and FLV with closed groups of pictures. It returns
wrong frames, without an error, of MPEG-TS, of MPEG-PS and AVI with B-frames, and of open groups (most of
HEVC). It has no AV1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workers.preprocess.video import Frame, VideoMetadata, check_size


class DecordVideo:
    def __init__(self, path: str, max_pixels: int) -> None:
        import decord  # type: ignore[import-untyped]

        self._reader = decord.VideoReader(path, num_threads=1)
        height, width, _ = self._reader[0].shape
        check_size(width, height, max_pixels)
        self.metadata = VideoMetadata(len(self._reader), float(self._reader.get_avg_fps()), height, width)

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        for number in numbers:  # one by one: a batch would have all frames in memory at once
            yield self._reader[number].asnumpy()
