"""Videos by decord, which whoever starts the server may choose (`--video-reader decord`).

Its frames are those asked for in mp4, Matroska, WebM and FLV with closed groups of pictures. Elsewhere it
gives others, without an error: in MPEG-TS, MPEG-PS and AVI with B-frames, and wherever groups are open (most
of HEVC). It knows no AV1.
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
        for number in numbers:  # one by one: a batch of large frames would be in memory at once
            yield self._reader[number].asnumpy()
