"""What vLLM's clients say about all pictures and videos of a request."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import Chat, ChatMessage, ImagePart, TextPart, VideoPart
from workers.api.media_kwargs import MAX_COUNT, with_media_settings

PICTURE, VIDEO = ImagePart(url="http://x/p"), VideoPart(url="http://x/v")
LIST = VideoPart(frames=(PICTURE, PICTURE))


def told(processor: Any = None, io: Any = None, *parts: ImagePart | VideoPart | TextPart) -> tuple[Any, ...]:
    chat = Chat((ChatMessage("system", "x"), ChatMessage("user", parts or (PICTURE,))))
    content = with_media_settings(chat, processor, io).messages[1].content
    assert isinstance(content, tuple)
    return content


def test_areas_hold_for_pictures_and_for_each_frame() -> None:
    kwargs = {"min_pixels": 784, "max_pixels": 3136.0, "do_resize": True, "fps": None}
    picture, text, video, frames = told(kwargs, None, PICTURE, TextPart("t"), VIDEO, LIST)
    assert picture == ImagePart(url="http://x/p", min_pixels=784, max_pixels=3136)
    assert text == TextPart("t")
    assert video == VideoPart(url="http://x/v", min_pixels=784, max_pixels=3136)
    assert frames == VideoPart(frames=(PICTURE, PICTURE), min_pixels=784, max_pixels=3136)


def test_a_size_is_an_area_of_pictures_and_kinds_have_their_own() -> None:
    size = {"shortest_edge": 784, "longest_edge": 3136}
    assert told({"size": size})[0].max_pixels == 3136
    kwargs = {"images_kwargs": {"size": size}, "videos_kwargs": {"max_pixels": 1568, "num_frames": 4}}
    picture, video = told(kwargs, None, PICTURE, VIDEO)
    assert picture == ImagePart(url="http://x/p", min_pixels=784, max_pixels=3136)
    assert video == VideoPart(url="http://x/v", max_pixels=1568, nframes=4)


def test_what_a_part_says_itself_counts() -> None:
    own = ImagePart(url="http://x/p", resized_height=56, resized_width=56)
    slow = VideoPart(url="http://x/v", max_frames=4)
    assert told({"max_pixels": 784, "fps": 1}, None, own, slow) == (
        own,
        VideoPart(url="http://x/v", max_frames=4, max_pixels=784),
    )


@pytest.mark.parametrize(
    ("video", "settings"),
    [
        ({"num_frames": 8}, {"min_frames": 8, "max_frames": 8}),
        ({"num_frames": 8, "fps": 2}, {"max_frames": 8, "fps": 2.0}),
        ({"fps": 0.5}, {"fps": 0.5}),
        ({"num_frames": -1, "fps": 2}, {"fps": 2.0}),
        ({"num_frames": -1}, {"min_frames": MAX_COUNT}),
        ({"num_frames": 8, "fps": -1}, {"min_frames": 8, "max_frames": 8}),
        ({"fps": None}, {}),
    ],
)
def test_frames_are_read_as_at_vllm(video: dict[str, Any], settings: dict[str, Any]) -> None:
    kwargs = {"video": video, "image": {"image_mode": "RGB"}, "audio": {}}
    assert told(None, kwargs, VIDEO, LIST) == (VideoPart(url="http://x/v", **settings), LIST)


@pytest.mark.parametrize(
    ("processor", "io", "field"),
    [
        ({"patch_size": 7}, None, "mm_processor_kwargs.patch_size"),
        ({"do_resize": False}, None, "mm_processor_kwargs.do_resize"),
        ({"max_pixels": 0}, None, "mm_processor_kwargs.max_pixels"),
        ({"max_pixels": True}, None, "mm_processor_kwargs.max_pixels"),
        ({"max_pixels": 2**40}, None, "mm_processor_kwargs.max_pixels"),
        ({"min_pixels": 1.5}, None, "mm_processor_kwargs.min_pixels"),
        ({"fps": 0}, None, "mm_processor_kwargs.fps"),
        ({"fps": float("inf")}, None, "mm_processor_kwargs.fps"),
        ({"num_frames": -1}, None, "mm_processor_kwargs.num_frames"),
        ({"size": 784}, None, "mm_processor_kwargs.size"),
        ({"size": {"height": 56}}, None, "mm_processor_kwargs.size.height"),
        ({"size": {"longest_edge": 784}}, None, "mm_processor_kwargs.size"),  # with a video
        ({"videos_kwargs": {"size": {"longest_edge": 784}}}, None, "mm_processor_kwargs.videos_kwargs.size"),
        ({"images_kwargs": {"fps": 2}}, None, "mm_processor_kwargs.images_kwargs.fps"),
        ({"images_kwargs": [1]}, None, "mm_processor_kwargs.images_kwargs"),
        (None, {"video": {"backend": "x"}}, "media_io_kwargs.video.backend"),
        (None, {"video": {"num_frames": 0}}, "media_io_kwargs.video.num_frames"),
        (None, {"video": {"fps": "2"}}, "media_io_kwargs.video.fps"),
        (None, {"video": 5}, "media_io_kwargs.video"),
        (None, {"image": {"image_mode": "L"}}, "media_io_kwargs.image.image_mode"),
        (None, {"audio": {"rate": 1}}, "media_io_kwargs.audio.rate"),
        ({"fps": 2}, {"video": {"num_frames": 4}}, "media_io_kwargs.video"),
    ],
)
def test_what_is_not_served_or_senseless_is_refused_by_name(processor: Any, io: Any, field: str) -> None:
    with pytest.raises(RequestError) as error:
        told(processor, io, PICTURE, VIDEO)
    assert error.value.info.field == field
