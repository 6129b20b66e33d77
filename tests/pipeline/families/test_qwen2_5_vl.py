"""Reading and time of Qwen2.5-VL; its geometry is Qwen2-VL's."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.families import ImageSize, MediaInfo, ModelInfo, PlacedMedia, SampledFrames
from pipeline.families.qwen2_5_vl import TimedVideoInfo, WindowedVisionInfo, time_step
from pipeline.wire.base import GridTHW
from pipeline.wire.generation import Span
from tests.pipeline.families.configs import QWEN2_5_VL, changed, read


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return read(tmp_path_factory.mktemp("qwen2_5_vl"), QWEN2_5_VL)


def test_a_published_checkpoint_is_read(info: ModelInfo) -> None:
    assert isinstance(info.vision, WindowedVisionInfo)
    assert isinstance(info.video, TimedVideoInfo)
    assert (info.vision.window_size, info.vision.full_attention_layers) == (4, (7, 15, 23, 31))
    assert (info.vision.embed_dim, info.vision.intermediate_size, info.vision.embedding_width) == (
        1280,
        3420,
        2048,
    )
    assert info.video.positions_per_second == 2
    assert (info.text.head_dim, info.text.mrope_section) == (128, (16, 24, 24))
    assert info.text.tie_word_embeddings
    assert (info.vision.min_pixels, info.vision.max_pixels) == (3136, 12845056)


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("config.vision_config.tokens_per_second", None, "does not say 'tokens_per_second'"),
        ("config.vision_config.fullatt_block_indexes", None, "does not say 'fullatt_block_indexes'"),
        ("config.vision_config.hidden_size", None, "does not say 'hidden_size'"),
        ("config.vision_config.window_size", 20, "windows of 20 pixels, less than one token"),
        ("config.vision_config.hidden_act", "gelu", "has hidden_act = 'gelu'; served is 'silu' only"),
        ("config.rms_norm_eps", None, "does not say 'rms_norm_eps'"),
        ("config.rope_scaling", {"type": "yarn", "mrope_section": [16, 24, 24]}, "unknown type 'yarn'"),
        ("config.use_sliding_window", True, "sliding attention window"),
        ("config.layer_types", ["full_attention", "sliding_attention"], "kinds .'sliding_attention'."),
        ("preprocessor_config.max_pixels", None, "does not say 'max_pixels'"),
        ("preprocessor_config.patch_size", 16, "has patch_size = 16; served is 14 only"),
    ],
)
def test_what_is_not_served_is_refused_by_its_key(
    place: str, value: object, what: str, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=what):
        read(tmp_path, changed(QWEN2_5_VL, {place: value}))


def test_the_top_level_says_whether_embeddings_are_tied(tmp_path: Path) -> None:
    files = changed(QWEN2_5_VL, {"config.text_config": {**QWEN2_5_VL["config.json"]}})
    for top in (True, False):
        again = changed(files, {"config.tie_word_embeddings": top})
        assert read(tmp_path, again).text.tie_word_embeddings is top


def test_processors_in_one_file_come_first(tmp_path: Path) -> None:
    together = {"image_processor": {**QWEN2_5_VL["preprocessor_config.json"], "max_pixels": 1 << 20}}
    info = read(tmp_path, {**QWEN2_5_VL, "processor_config.json": together})
    assert info.vision.max_pixels == 1 << 20


def seconds_of(frames: SampledFrames) -> float:
    """`second_per_grid_ts` of transformers for these frames."""
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(
        total_num_frames=frames.num_source_frames,
        fps=frames.source_fps,
        frames_indices=list(frames.numbers),
    )
    return float(2 / metadata.sampled_fps)


def test_time_is_that_of_hugging_face(info: ModelInfo) -> None:
    """The rule of transformers for rows of time, in float32, at random frame rates."""
    rng = random.Random(0)
    for _ in range(10_000):
        total, fps = rng.randint(4, 5000), rng.choice([1, 12.5, 23.976, 24, 29.97, 30, rng.uniform(0.5, 120)])
        numbers = tuple(info.family.sample_frames(total, fps, rng.choice([0.5, 1, 2, 3, 10]), 4, 64, info))
        frames = SampledFrames(numbers, total, rng.choice([fps, None]))
        media = MediaInfo(GridTHW(len(numbers) // 2, 2, 2), frames)
        interval = 2 * torch.tensor([seconds_of(frames)])[0]
        expected = (torch.arange(len(numbers) // 2) * interval).long() + 3
        placed = PlacedMedia(media, (Span(3, len(numbers) // 2),))
        positions, _ = info.family.positions(3 + len(numbers) // 2, [placed], info)
        assert positions[0, 3:].tolist() == expected.tolist()


def test_text_goes_on_behind_the_largest_position_of_all_rows(info: ModelInfo) -> None:
    """Two frames a second are two positions apart: 8 frames end later than 4 columns do."""
    media = MediaInfo(GridTHW(4, 4, 8), SampledFrames(tuple(range(0, 120, 15)), 120, 30.0))
    positions, delta = info.family.positions(2 + 32 + 1, [PlacedMedia(media, (Span(2, 32),))], info)
    assert positions[0].tolist() == [0, 1, *np.repeat([2, 4, 6, 8], 8).tolist(), 9]
    assert positions[:, -1].tolist() == [9] * 3
    assert delta == 10 - 35


def test_times_of_frames_in_a_list(info: ModelInfo) -> None:
    def step(**times: object) -> float:
        frames = SampledFrames(tuple(range(5)), 5, **{"source_fps": None, **times})  # type: ignore[arg-type]
        return time_step(MediaInfo(GridTHW(3, 4, 4), frames), info)

    assert step() == pytest.approx(2 * 2 / 24)
    assert step(source_fps=4.0) == 1.0
    assert step(times=(1.0, 1.5, 2.0, 2.5, 3.0)) == 2.0
    assert step(times=(1.0, 1.5, 2.0, 2.5, 5.0)) == 4.0


def test_only_the_key_of_the_kv_knows_of_time(info: ModelInfo) -> None:
    size = ImageSize(56, 84)
    grid = info.vision.grid_of(size, 6)
    medias = [MediaInfo(grid, SampledFrames((0, 5, 10, 15, 20, 25), 30, fps)) for fps in (10.0, 20.0, None)]
    keys = {info.family.kv_hash(b"same pixels", media, info) for media in medias}
    assert len(keys) == 3
    picture = MediaInfo(info.vision.grid_of(size))
    assert info.family.kv_hash(b"same pixels", picture, info) == b"same pixels"
