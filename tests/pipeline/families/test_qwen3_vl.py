"""Reading, sizes, sampling, times and positions of Qwen3-VL, against Hugging Face's own code."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.families import (
    AreaLimits,
    ImageSize,
    MediaInfo,
    ModelInfo,
    PlacedMedia,
    Placeholders,
    SampledFrames,
    WithoutMarks,
    qwen3_vl,
)
from pipeline.families.qwen3_vl import (
    VISION_END,
    VISION_START,
    ExpertsInfo,
    Qwen3TextInfo,
    Qwen3VideoInfo,
    Qwen3VisionInfo,
)
from pipeline.families.resizing import smart_resize
from pipeline.wire.base import GridTHW
from pipeline.wire.generation import Span
from tests.pipeline.families.configs import QWEN3_VL, changed, read
from tests.reference import video_processing
from workers.llm.parallel import HeadLayout

EXPERTS = {
    "config.model_type": "qwen3_vl_moe",
    "config.text_config.num_experts": 128,
    "config.text_config.num_experts_per_tok": 8,
    "config.text_config.moe_intermediate_size": 768,
    "config.text_config.decoder_sparse_step": 1,
    "config.text_config.mlp_only_layers": [],
}


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return read(tmp_path_factory.mktemp("qwen3_vl"), QWEN3_VL)


def test_a_published_checkpoint_is_read(info: ModelInfo) -> None:
    text, vision, video = info.text, info.vision, info.video
    assert isinstance(text, Qwen3TextInfo)
    assert isinstance(vision, Qwen3VisionInfo)
    assert isinstance(video, Qwen3VideoInfo)
    assert (text.head_dim, text.rope_theta, text.num_features) == (128, 5e6, 3)
    assert text.experts is None
    assert (vision.position_side, vision.deepstack_layers, vision.embedding_width) == (
        48,
        (5, 11, 17),
        4 * 2560,
    )
    assert (vision.min_pixels, vision.max_pixels, vision.factor) == (65536, 16777216, 32)
    assert (video.min_total_pixels, video.max_total_pixels, video.fps) == (4096, 25165824, 2.0)
    assert video.capped_frame_pixels is None


def test_experts_are_read(tmp_path: Path) -> None:
    files = changed(QWEN3_VL, EXPERTS)
    text = read(tmp_path, files).text
    assert isinstance(text, Qwen3TextInfo)
    assert text.experts == ExpertsInfo(
        num_experts=128, num_chosen=8, intermediate_size=768, layers=tuple(range(36))
    )
    some = {"config.text_config.decoder_sparse_step": 2, "config.text_config.mlp_only_layers": [1, 5]}
    text = read(tmp_path, changed(files, some)).text
    assert isinstance(text, Qwen3TextInfo)
    assert text.experts is not None
    assert text.experts.layers == tuple(number for number in range(3, 36, 2) if number != 5)


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("config.text_config.head_dim", None, "does not say 'head_dim'"),
        ("config.text_config.rope_theta", None, "does not say 'rope_theta'"),
        ("config.text_config.rms_norm_eps", None, "does not say 'rms_norm_eps'"),
        ("config.text_config.attention_bias", True, "has attention_bias = True; served is False only"),
        ("config.text_config.hidden_act", "gelu", "has hidden_act = 'gelu'"),
        ("config.text_config.rope_scaling.rope_type", "yarn", "unknown type 'yarn'"),
        ("config.text_config.rope_scaling.mrope_interleaved", False, "mrope_interleaved = False"),
        ("config.vision_config.deepstack_visual_indexes", None, "does not say 'deepstack_visual_indexes'"),
        ("config.vision_config.num_position_embeddings", 2305, "2305, which is no square"),
        ("config.vision_config.out_hidden_size", 2048, "vision embeddings of 8192 numbers"),
        ("config.vision_config.patch_size", None, "does not say 'patch_size'"),
        ("config.vision_config.deepstack_visual_indexes", [5, 24], "not layers of the tower"),
        ("config.vision_config.deepstack_visual_indexes", [5, 5, 6], "not layers of the tower"),
        ("config.vision_config.in_channels", 4, "has in_channels = 4; served is 3 only"),
        (
            "config.vision_config.temporal_patch_size",
            [2, 3],
            "temporal_patch_size = .2, 3., which is no whole",
        ),
        ("preprocessor_config.do_normalize", False, "has do_normalize = False"),
        ("preprocessor_config.rescale_factor", 1.0, "has rescale_factor = 1.0"),
        ("video_preprocessor_config.image_mean", [0.4, 0.5, 0.5], "has image_mean = .0.4"),
        ("video_preprocessor_config.resample", 2, "has resample = 2"),
        ("video_preprocessor_config.num_frames", 8, "has num_frames = 8"),
        ("preprocessor_config.image_mean", None, "does not say 'image_mean'"),
        ("preprocessor_config.size", None, "does not say 'size'"),
        ("video_preprocessor_config.size", None, "does not say 'size'"),
    ],
)
def test_what_is_not_served_is_refused_by_its_key(
    place: str, value: object, what: str, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=what):
        read(tmp_path, changed(QWEN3_VL, {place: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"config.text_config.attention_bias": None},
        {"config.vision_config.temporal_patch_size": [2]},
        {"config.vision_config.patch_size": [16, 16]},
        {"preprocessor_config.rescale_factor": 0.00392156862745098},
        {"video_preprocessor_config.min_pixels": 1, "video_preprocessor_config.max_pixels": 2},
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(changes: dict[str, object], tmp_path: Path, info: ModelInfo) -> None:
    read_again = read(tmp_path, changed(QWEN3_VL, changes))
    assert (read_again.vision, read_again.video) == (info.vision, info.video)


def test_the_older_of_two_rotary_settings_counts(tmp_path: Path) -> None:
    """As in transformers: who adds one to a config that has the newer already means it."""
    rope = QWEN3_VL["config.json"]["text_config"]["rope_scaling"]
    both = {
        "config.text_config.rope_parameters": rope,
        "config.text_config.rope_scaling": {**rope, "rope_type": "yarn"},
    }
    with pytest.raises(ValueError, match="unknown type 'yarn'; served is 'default' only"):
        read(tmp_path, changed(QWEN3_VL, both))


def test_more_choices_than_experts_are_refused(tmp_path: Path) -> None:
    files = changed(QWEN3_VL, {**EXPERTS, "config.text_config.num_experts_per_tok": 129})
    with pytest.raises(ValueError, match="num_experts_per_tok = 129 of 128 experts"):
        read(tmp_path, files)


def test_ranks_need_not_divide_an_mlp_that_no_layer_has(tmp_path: Path) -> None:
    files = changed(QWEN3_VL, {**EXPERTS, "config.text_config.intermediate_size": 9727})
    assert HeadLayout(read(tmp_path, files).text, 0, 2).num_heads == 16
    files = changed(files, {"config.text_config.mlp_only_layers": [0]})
    with pytest.raises(ValueError, match="does not divide the model's intermediate size 9727"):
        HeadLayout(read(tmp_path, files).text, 0, 2)


def test_sizes_of_pictures_are_those_of_hugging_face(info: ModelInfo) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    rng = random.Random(0)
    for _ in range(10_000):
        height = int(2 ** rng.uniform(0, 13))
        width = max(1, min(8192, int(height * 2 ** rng.uniform(-7.6, 7.6))))
        if max(height, width) > 200 * min(height, width):
            continue  # refused before its size is asked for
        low = rng.choice([4096, 65536, 1 << 18])
        high = low * rng.choice([1, 4, 256])
        expected = reference(height, width, factor=32, min_pixels=low, max_pixels=high)
        assert smart_resize(ImageSize(height, width), 32, AreaLimits(low, high)) == expected


def resize(size: ImageSize, count: int, info: ModelInfo) -> ImageSize:
    """A frame as it is seen where a request sets no limits."""
    limits = AreaLimits(info.video.min_pixels, info.video.max_pixels)
    return info.family.frame_size(size, count, limits, info.video.max_total_pixels, info)


@pytest.mark.parametrize("caps", [False, True])
def test_sizes_of_videos_are_those_of_hugging_face(caps: bool, tmp_path: Path) -> None:
    reference = video_processing("qwen3_vl")
    files = changed(QWEN3_VL, {"video_preprocessor_config.cap_pixels_per_frame": caps})
    info = read(tmp_path, files)
    rng = random.Random(0)
    for _ in range(10_000):
        height = int(2 ** rng.uniform(0, 12))
        width = max(1, min(4096, int(height * 2 ** rng.uniform(-7.6, 7.6))))
        count, high = rng.choice([2, 3, 4, 5, 6, 7, 31, 64, 301, 768]), 25165824
        if caps:
            high = count * max(min(768 * 32 * 32, high // count), int(4096 * 1.05))
        resized = partial(resize, ImageSize(height, width), count, info)
        try:
            expected = reference.smart_resize(
                count, height, width, factor=32, min_pixels=4096, max_pixels=high
            )
        except ValueError:
            with pytest.raises(ValueError, match="factor of 200"):
                resized()
        else:
            assert resized() == expected, (count, height, width)
            assert expected[0] * expected[1] * 3 <= info.largest_pixel_bytes


def test_limits_of_a_frame_narrow_those_of_the_video(info: ModelInfo) -> None:
    size, whole = ImageSize(720, 1280), info.video.max_total_pixels
    most = info.family.frame_size(size, 8, AreaLimits(1, 64 * 1024), whole, info)
    assert most.height * most.width <= 64 * 1024
    least = info.family.frame_size(size, 8, AreaLimits(2_000_000, 4_000_000), whole, info)
    assert least.height * least.width >= 2_000_000
    total = info.family.frame_size(size, 8, AreaLimits(1, 4_000_000), 8 * 32 * 1024, info)
    assert total.height * total.width <= 32 * 1024


@pytest.mark.parametrize("caps", [False, True])
def test_a_frame_is_never_outside_its_own_limits(caps: bool, tmp_path: Path) -> None:
    """Whatever the number of frames, which `smart_resize` rounds to an even one, half to even."""
    files = changed(QWEN3_VL, {"video_preprocessor_config.cap_pixels_per_frame": caps})
    info = read(tmp_path, files)
    rng = random.Random(1)
    for _ in range(3000):
        size = ImageSize(rng.randint(200, 4000), rng.randint(200, 4000))
        count = rng.choice([2, 3, 4, 5, 9, 13, 17, 60])
        low = rng.choice([1, 50_000])
        high = rng.choice([100_000, 300_000, 4_000_000])
        limits, whole = AreaLimits(low, high), info.video.max_total_pixels
        seen = info.family.frame_size(size, count, limits, whole, info)
        area = seen.height * seen.width
        slack = 32 * (seen.height + seen.width)
        assert low - slack <= area <= high + slack, (size, count, limits, seen)
        assert area <= high or min(seen) == 32, "only sides of one token may pass it"


def test_a_video_of_one_frame_is_refused(info: ModelInfo) -> None:
    with pytest.raises(ValueError, match="at least 2 frames, this one has 1"):
        info.family.frame_size(ImageSize(64, 64), 1, AreaLimits(1, 1 << 20), 1 << 24, info)


def test_frames_and_their_times_are_those_of_hugging_face(info: ModelInfo) -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    sample = video_processing("qwen3_vl").Qwen3VLVideoProcessor.sample_frames
    rng = random.Random(0)
    for _ in range(10_000):
        total = rng.randint(2, 20_000)
        rate = rng.choice([1, 12.5, 23.976, 24, 25, 29.97, 30, 60, rng.uniform(0.5, 120)])
        fps, most = rng.choice([0.1, 0.5, 1, 2, 3, 7.5, 30]), rng.choice([4, 64, 768])
        of_class = SimpleNamespace(fps=2, min_frames=4, max_frames=most)
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        expected = sample(of_class, metadata, fps=fps).tolist()
        numbers = info.family.sample_frames(total, rate, fps, 4, most, info)
        assert numbers == expected
        grid = info.vision.grid_of(ImageSize(32, 64), len(numbers))
        media = MediaInfo(grid, SampledFrames(tuple(numbers), total, rate))
        times = Qwen3VLProcessor._calculate_timestamps(None, list(expected), rate, 2)  # type: ignore[arg-type]
        texts = [segment for segment in info.family.segments(media, info) if isinstance(segment, str)]
        assert texts[0::2] == [f"<{time:.1f} seconds>{VISION_START}" for time in times]
        assert set(texts[1::2]) == {VISION_END}


def test_a_picture_is_one_run_and_a_video_one_each_patch(info: ModelInfo) -> None:
    size = ImageSize(64, 96)
    picture = MediaInfo(info.vision.grid_of(size))
    assert info.family.segments(picture, info) == (Placeholders(6),)
    video = MediaInfo(info.vision.grid_of(size, 3), SampledFrames((0, 12, 24), 25, 12.0))
    first, second = f"<0.5 seconds>{VISION_START}", f"<2.0 seconds>{VISION_START}"
    runs = (first, Placeholders(6), VISION_END, second, Placeholders(6), VISION_END)
    assert info.family.segments(video, info) == runs
    assert info.family.kv_hash(b"pixels", video, info) == b"pixels", "times are tokens of the prompt"


def test_the_outer_marks_are_left_out_by_one_switch(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3_vl, "KEEPS_OUTER_MARKS", False)
    video = MediaInfo(info.vision.grid_of(ImageSize(64, 96), 2), SampledFrames((0, 1), 2, 1.0))
    assert info.family.segments(video, info)[0] == WithoutMarks(VISION_START, VISION_END)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"source_fps": 2.0}, ["0.2", "1.0"]),
        ({"times": (0.0, 0.1, 7.0)}, ["0.1", "7.0"]),
        ({}, ["0.0", "0.1"]),  # 24 frames a second
    ],
)
def test_times_of_frames_in_a_list(
    times: dict[str, object], expected: list[str], info: ModelInfo
) -> None:  # fmt: skip
    frames = SampledFrames((0, 1, 2), 3, **{"source_fps": None, **times})  # type: ignore[arg-type]
    segments = info.family.segments(MediaInfo(GridTHW(2, 2, 2), frames), info)
    assert segments[0::3] == tuple(f"<{time} seconds>{VISION_START}" for time in expected)


class Prompt:
    """Token ids, their types as transformers numbers them, and the items among them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.types: list[int] = []
        self.items: list[PlacedMedia] = []
        self.grids: dict[int, list[GridTHW]] = {1: [], 2: []}

    def add(self, token: int, kind: int, count: int) -> Span:
        self.ids += [token] * count
        self.types += [kind] * count
        return Span(len(self.ids) - count, count)

    def add_item(self, kind: int, grid: GridTHW, between: int) -> None:
        self.grids[kind].append(grid)
        spans: list[Span] = []
        for frame in range(grid.t):
            if frame:
                self.add(7, 0, between)
            spans.append(self.add(151654 + kind, kind, grid.h * grid.w // 4))
        frames = SampledFrames(tuple(range(2 * grid.t)), 2 * grid.t, 2.0) if kind == 2 else None
        self.items.append(PlacedMedia(MediaInfo(grid, frames), tuple(spans)))


def test_positions_are_those_of_hugging_face(info: ModelInfo) -> None:
    """Two pictures and two videos between texts, with grids of every kind."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rng = np.random.default_rng(0)
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1}))
    for _ in range(200):
        prompt = Prompt()
        for kind in rng.permutation([1, 1, 2, 2]).tolist():
            prompt.add(7, 0, int(rng.integers(1, 6)))
            count = int(rng.integers(1, 5)) if kind == 2 else 1
            grid = GridTHW(count, *(2 * int(side) for side in rng.integers(1, 9, 2)))
            prompt.add_item(kind, grid, between=int(rng.integers(1, 9)))
        prompt.add(7, 0, 3)
        expected, deltas = model.get_rope_index(
            torch.tensor([prompt.ids]),
            mm_token_type_ids=torch.tensor([prompt.types]),
            image_grid_thw=torch.tensor(prompt.grids[1]),
            video_grid_thw=torch.tensor(prompt.grids[2]),
        )
        ours, delta = info.family.positions(len(prompt.ids), prompt.items, info)
        assert ours.tolist() == expected[:, 0].tolist()
        assert delta == int(deltas[0, 0])
