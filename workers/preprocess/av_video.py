"""Videos by PyAV (FFmpeg): frame n is the n-th that decoding the whole file gives.

Seeking is not used: where it lands depends on the container, and what is decoded from there on the codec.
Instead packets are read from the file's beginning, which is cheap, and the decoder is fed from the last place
where decoding may start (`packet_index.py`). Where that is not certain the decoder is fed from the beginning,
and the frames are counted as it gives them out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from workers.preprocess.bitstream import look_of
from workers.preprocess.containers import Container
from workers.preprocess.packet_index import index_packets
from workers.preprocess.video import Frame, VideoBroken, VideoMetadata, check_size

OPTIONS = {
    "protocol_whitelist": "file",
    "enable_drefs": "0",  # of mp4: other files that hold the media
    "use_absolute_path": "0",
}
# A video of so many pixels in all is decoded to count its frames even where its packets tell: in a fraction
# of a second.
COUNTED_PIXELS = 1 << 25
# With more, FFmpeg conceals no damage in H.264: what is missing of a picture shows what its memory held
# before, perhaps of another client's video.
THREADS = 1
RATE_TOLERANCE = 0.1  # a container's frame rate may differ so much from the frames' times
NOT_DECODABLE = "the media is not a video that can be decoded"


class AvVideo:
    """Raises VideoBroken or FFmpeg's errors if nothing can be decoded."""

    def __init__(self, path: str, kind: Container, max_pixels: int) -> None:
        self._path, self._kind, self._max_pixels = path, kind, max_pixels
        self._to_rgb = VideoReformatter()  # kept, since it is slow to make
        decoder = self._start()
        check_size(decoder.codec.width, decoder.codec.height, max_pixels)
        look = look_of(decoder.codec.name, decoder.codec.extradata) if kind.has_packet_times else None
        self._index = index_packets(decoder.packets(), look) if look is not None else None
        self._decoder = self._start() if look is not None else decoder
        self._next = 0  # number of the frame that the decoder gives next
        first = self._decoder.peek()
        if first is None:
            raise VideoBroken(NOT_DECODABLE)
        self._height, self._width = self._picture(first).shape[:2]
        if self._index is not None:
            num_pixels = len(self._index.times) * first.width * first.height
            if num_pixels <= COUNTED_PIXELS or first.interlaced_frame:  # fields may be packets of their own
                self._index = None

    @cached_property
    def metadata(self) -> VideoMetadata:
        if self._index is not None:
            times, fps = self._index.times, self._decoder.fps
            num_frames, first, last = len(times), times[0], times[-1]
        else:
            counter = self._start(skip_loop_filter="all")  # only their number counts
            num_frames, first, last = counter.count()
            fps = counter.fps
        duration = (last - first) * self._decoder.time_base
        measured = (num_frames - 1) / duration if duration > 0 else 0.0
        is_off = self._kind.has_packet_times and abs(measured - fps) > RATE_TOLERANCE * fps
        if measured > 0 and (fps <= 0 or is_off):
            fps = measured
        return VideoMetadata(num_frames, fps if fps > 0 else 1.0, self._height, self._width)

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        for number in numbers:
            frame = self._indexed(number) if self._index is not None else None
            if frame is None:
                frame = self._counted(number)
            if frame is None:
                raise VideoBroken(f"the video is broken: frame {number} cannot be decoded")
            yield self._picture(frame)

    def _indexed(self, number: int) -> Any | None:
        """A frame, from the last entry before it. None when the file is not as its packets say."""
        assert self._index is not None
        if number >= len(self._index.times):
            return None
        entry = self._index.entry_of(number)
        if self._next > number:
            self._decoder, self._next = self._start(), 0
        if entry.packet >= self._decoder.next_packet and entry.frame > self._next:
            self._decoder.enter(entry.packet)
            self._next = entry.frame
        while (frame := self._decoder.next()) is not None:
            wanted = self._index.times[self._next]
            if frame.pts is None or frame.pts > wanted or frame.is_corrupt or self._decoder.num_errors:
                break
            if frame.pts < wanted:  # shown before the entry
                continue
            self._next += 1
            if self._next > number:
                return frame
        self._index = None
        self._decoder, self._next = self._start(), 0
        return None

    def _counted(self, number: int) -> Any | None:
        if self._next > number:
            self._decoder, self._next = self._start(), 0
        while (frame := self._decoder.next()) is not None:
            self._next += 1
            if self._next > number:
                return frame
        return None

    def _start(self, **options: str) -> _Decoder:
        return _Decoder(self._path, self._kind.demuxer, {"max_pixels": str(self._max_pixels), **options})

    def _picture(self, frame: Any) -> Frame:
        check_size(frame.width, frame.height, self._max_pixels)
        picture = self._to_rgb.reformat(frame, format="rgb24")
        return upright(picture.to_ndarray(), display_matrix(frame))


class _Decoder:
    """Decodes forwards, from the file's beginning or from a packet ahead. Damaged packets are left out."""

    def __init__(self, path: str, demuxer: str, options: dict[str, str]) -> None:
        self._container: Any = av.open(
            f"file:{path}", format=demuxer, options={"format_whitelist": demuxer, **OPTIONS}
        )
        self._stream = _first_video(self._container)
        self.codec = self._stream.codec_context
        if self.codec is None:
            raise VideoBroken("the video's codec is not supported")
        self.codec.thread_count = THREADS
        self.codec.options = options
        self._packets = self.packets()
        self._ready: deque[Any] = deque()
        self._has_ended = False
        self.next_packet = 0
        self.num_errors = 0

    @property
    def fps(self) -> float:
        """As the container has it; 0 where it has none."""
        return float(self._stream.average_rate or self._stream.guessed_rate or 0)

    @property
    def time_base(self) -> float:
        return float(self._stream.time_base or 0)

    def packets(self) -> Iterator[Any]:
        """Those with data; reading ends where the file is broken."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                _raise_memory_error(error)
                return
            if packet is None:
                return
            if packet.size:  # an empty one would end the decoder
                yield packet

    def enter(self, packet: int) -> None:
        """Goes on at a packet ahead; what lies between is not decoded."""
        while self.next_packet < packet and next(self._packets, None) is not None:
            self.next_packet += 1
        if self.codec.is_open:
            self.codec.flush_buffers()
        self._ready.clear()

    def next(self) -> Any | None:
        """The frame that comes next in the order of presentation; None after the last."""
        while not self._ready and not self._has_ended:
            packet = next(self._packets, None)
            self.next_packet += 1
            self._has_ended = packet is None
            try:
                self._ready.extend(self.codec.decode(packet))
            except av.FFmpegError as error:
                _raise_memory_error(error)
                self.num_errors += 1
        return self._ready.popleft() if self._ready else None

    def peek(self) -> Any | None:
        if (frame := self.next()) is not None:
            self._ready.appendleft(frame)
        return frame

    def count(self) -> tuple[int, int, int]:
        """How many frames there are, and the times of the first and of the last that have one."""
        number, first, last = 0, None, 0
        while (frame := self.next()) is not None:
            number += 1
            if frame.pts is not None:
                first = frame.pts if first is None else first
                last = frame.pts
        return number, first or 0, last


def _raise_memory_error(error: Exception) -> None:
    if isinstance(error, MemoryError):
        raise error


def _first_video(container: Any) -> Any:
    """The first that is no cover picture."""
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            return stream
    raise VideoBroken("the file has no video, or only a cover picture")


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of how a frame is to be shown: x' = a x + c y, y' = b x + d y, y downwards."""
    try:
        matrix = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)
    except (KeyError, ValueError, IndexError):  # none, or side data that PyAV has no name for
        return 1, 0, 0, 1
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def upright(image: Frame, matrix: tuple[int, int, int, int]) -> Frame:
    """Turned and mirrored by quarters of a circle, as a display matrix says."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return image.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]
