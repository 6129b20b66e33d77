"""Videos for tests: frames that tell their number, encoded by PyAV."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

from tests.chats import ChatTurns, Clip
from tests.pictures import scene

Frames = npt.NDArray[np.uint8]  # [frames, height, width, 3]
NUMBER_BITS = 8


def counting_frames(count: int, size: tuple[int, int] = (160, 120)) -> Frames:
    """A picture that changes slowly, with the frame's number in bars at the bottom: readable behind any
    codec."""
    width, height = size
    frames = np.stack([np.asarray(scene(number // 8, size)) for number in range(count)])
    step = width // NUMBER_BITS
    for number, frame in enumerate(frames):
        for bit in range(NUMBER_BITS):
            frame[-height // 5 :, bit * step : (bit + 1) * step] = 255 * (number >> bit & 1)
    return frames


def read_number(frame: Frames) -> int:
    height, width, _ = frame.shape
    step = width / NUMBER_BITS
    return sum(
        1 << bit for bit in range(NUMBER_BITS) if frame[-height // 10, int((bit + 0.5) * step)].mean() > 127
    )


def encode_video(
    frames: Frames,
    fps: float = 24.0,
    kind: str = "mp4",
    codec: str = "libx264",
    has_sound: bool = False,
    **options: str,
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=16000) if has_sound else None
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        if sound is not None:
            noise = av.AudioFrame.from_ndarray(
                np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono"
            )
            noise.sample_rate = 16000
            container.mux(sound.encode(noise))
            container.mux(sound.encode())
    return buffer.getvalue()


CLIP = Clip(encode_video(counting_frames(30, (112, 84)), 10.0), fps=2.0)
VIDEO_CHATS: dict[str, ChatTurns] = {
    "a video between pictures": [("user", [scene(10), CLIP, "What happens?", scene(11, (84, 84))])],
    "frames, an odd number": [
        ("user", [tuple(scene(number, (112, 84)) for number in range(12, 17)), "Which was first?"])
    ],
}
