from __future__ import annotations

import dataclasses

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.families import ModelInfo, read_model_info


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return read_model_info(EMBEDDED / "model")


def test_no_frame_is_larger_than_a_picture(info: ModelInfo) -> None:
    """Pools have room for so much: a chunk that never fits would wait for ever."""
    video = dataclasses.replace(info.video, max_pixels=info.vision.max_pixels + 1)
    with pytest.raises(ValueError, match="a frame may have 19601 pixels, a picture 19600"):
        dataclasses.replace(info, video=video)
