"""Geometry, prompting and `config.json` of Qwen2-VL, against Hugging Face's own code."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.families import (
    AreaLimits,
    ImageSize,
    MediaInfo,
    PlacedMedia,
    Placeholders,
    SampledFrames,
    read_model_info,
)
from pipeline.families.qwen2_vl import _arange, sample_frames
from pipeline.families.resizing import smart_resize
from pipeline.wire.base import GridTHW
from pipeline.wire.generation import Span
from tests import reference
from tests.chats import CHATS
from tests.pictures import limits, seen_size
from tests.reference import Reference
from tests.videos import VIDEO_CHATS

INFO = read_model_info(EMBEDDED / "model")
FAMILY = INFO.family


def placed(offset: int, grid: GridTHW) -> PlacedMedia:
    return PlacedMedia(MediaInfo(grid), (Span(offset, grid.num_patches // 4),))


SIZES = [(28, 28), (1, 200), (200, 1), (56, 57), (1000, 999), (4000, 21), (14, 14), (43, 42), (70, 98)]


@pytest.mark.parametrize("size", SIZES)
def test_resized_sizes_are_those_of_hugging_face(size: tuple[int, int], random_checkpoint: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    info = read_model_info(random_checkpoint)
    low, high = limits(info)
    expected = reference(*size, factor=28, min_pixels=low, max_pixels=high)
    assert seen_size(ImageSize(*size), info) == expected
    assert expected[0] * expected[1] <= info.vision.largest_pixels


def test_no_size_passes_the_bound_on_resized_pixels(random_checkpoint: Path) -> None:
    info = read_model_info(random_checkpoint)
    rng = np.random.default_rng(0)
    for _ in range(5000):
        side = int(2 ** rng.uniform(0, 13))
        other = max(1, int(side * rng.uniform(1 / 200, 1)))
        size = ImageSize(side, other) if rng.random() < 0.5 else ImageSize(other, side)
        if max(size) <= 200 * min(size):
            # A request may ask for at least as much as the server allows at most.
            for low in (info.vision.min_pixels, info.vision.max_pixels):
                resized = smart_resize(size, info.vision.factor, AreaLimits(low, info.vision.max_pixels))
                assert resized.height * resized.width <= info.vision.largest_pixels, size


@pytest.mark.parametrize(("least", "most_frames"), [(2, 3000), (3000, 200_000)])
def test_frames_are_sampled_as_by_hugging_face(least: int, most_frames: int) -> None:
    rng = random.Random(0)
    for _ in range(1000):
        total = rng.randint(least, most_frames)
        rate = rng.choice([1, 5, 12.5, 23.976, 24, 25, 29.97, 30, 60, rng.uniform(0.5, 120)])
        fps, most = rng.choice([0.1, 0.5, 1, 2, 4, 30]), rng.choice([4, 10, 64, 768])
        found = sample_frames(total, rate, fps, 4, most, 2)
        assert found == reference.sample_frames(total, rate, fps, most), (total, rate, fps, most)


def test_frames_are_spread_as_torch_spreads_them() -> None:
    rng = random.Random(2)
    for _ in range(5000):
        total = rng.randint(2, 200_000)
        step = total / rng.randint(1, min(total, 2000))
        expected = torch.arange(0, total, step).int()
        found = _arange(total, step).astype(np.int32)
        np.testing.assert_array_equal(found, expected.numpy(), err_msg=f"{total} by {step}")


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_the_shortest_videos_are_seen_whole_or_in_pairs(total: int) -> None:
    frames = sample_frames(total, 24.0, 2.0, 4, 768, 2)
    assert len(frames) == (1 if total == 1 else total // 2 * 2)
    assert frames == sorted(set(frames))


def test_frames_have_the_size_that_hugging_face_gives_them() -> None:
    rng = random.Random(1)
    for _ in range(500):
        size = ImageSize(rng.randint(30, 2200), rng.randint(30, 2200))
        count = rng.choice([1, 2, 16, 301, 768])
        low, high, total = 128 * 28 * 28, 768 * 28 * 28, int(128_000 * 28 * 28 * 0.9)
        most = max(min(high, total * 2 // count), int(low * 1.05))
        resize = reference.video_processing().smart_resize
        expected = resize(*size, factor=28, min_pixels=low, max_pixels=most)
        assert FAMILY.frame_size(size, count, AreaLimits(low, high), total * 2, INFO) == expected


@pytest.mark.parametrize("name", [*CHATS, *VIDEO_CHATS])
def test_positions_are_those_of_hugging_face(name: str) -> None:
    reference = Reference(EMBEDDED / "model")
    inputs = reference.inputs({**CHATS, **VIDEO_CHATS}[name])
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    none = torch.empty(0, 3, dtype=torch.int64)
    grids = {name: inputs.get(name, none) for name in ("image_grid_thw", "video_grid_thw")}
    positions, deltas = reference.model.model.get_rope_index(ids, mm_token_type_ids=types, **grids)
    items: list[PlacedMedia] = []
    search = 0
    waiting = [iter(of_kind.tolist()) for of_kind in grids.values()]
    for _ in range(sum(map(len, grids.values()))):
        start = next(i for i in range(search, ids.shape[1]) if types[0, i])
        items.append(placed(start, GridTHW(*next(waiting[int(types[0, start]) - 1]))))
        search = items[-1].spans[0].stop
    ours, delta = FAMILY.positions(ids.shape[1], items, INFO)
    assert ours.tolist() == positions[:, 0].tolist()
    assert delta == int(deltas[0, 0])


def test_a_video_counts_time_in_the_first_row() -> None:
    positions, delta = FAMILY.positions(2 + 3 * 2 * 2 + 1, [placed(2, GridTHW(3, 4, 4))], INFO)
    assert positions[0].tolist() == [0, 1] + [2] * 4 + [3] * 4 + [4] * 4 + [5]
    assert positions[2].tolist() == [0, 1] + [2, 3, 2, 3] * 3 + [5]
    assert delta == 6 - 15


def test_an_item_is_one_run_and_its_keys_are_one() -> None:
    frames = SampledFrames((0, 5, 10, 15, 20, 25), 30, 10.0)
    media = MediaInfo(INFO.vision.grid_of(ImageSize(56, 84), 6), frames)
    assert media.grid_thw == GridTHW(3, 4, 6)
    assert FAMILY.segments(media, INFO) == (Placeholders(18),)
    assert FAMILY.kv_hash(b"hash", media, INFO) == b"hash"


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """As on the hub: the text model's keys at the top, rotary settings under their old names."""
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters")
    del text["model_type"]
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    rest = {name: value for name, value in config.items() if name != "text_config"}
    return {**text, **rest, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def checkpoint(folder: Path, config: dict[str, Any], **processor: Any) -> Path:
    for name in ("preprocessor_config.json", "generation_config.json"):
        shutil.copy(EMBEDDED / "model" / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def config() -> dict[str, Any]:
    return dict(json.loads((EMBEDDED / "model" / "config.json").read_text()))


def test_both_layouts_say_the_same(tmp_path: Path) -> None:
    info = read_model_info(checkpoint(tmp_path, flat(config())))
    assert (info.text, info.vision, info.video) == (INFO.text, INFO.vision, INFO.video)
    assert info.eos_token_ids == INFO.eos_token_ids
    assert (info.image_token_id, info.video_token_id) == (INFO.image_token_id, INFO.video_token_id)


def test_old_and_new_names_of_the_limits_say_the_same(tmp_path: Path) -> None:
    old = read_model_info(checkpoint(tmp_path, config(), min_pixels=3136, max_pixels=12_845_056))
    size = {"shortest_edge": 3136, "longest_edge": 12_845_056}
    assert read_model_info(checkpoint(tmp_path, config(), size=size)).vision == old.vision
    assert old.video.max_pixels == 768 * 28 * 28


@pytest.mark.parametrize("key", ["rms_norm_eps", "hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_key_without_a_safe_default_is_refused_by_name(key: str, tmp_path: Path) -> None:
    without = config()
    del without["text_config"][key]
    with pytest.raises(ValueError, match=key):
        read_model_info(checkpoint(tmp_path, without))


def test_a_largest_area_is_not_guessed_but_may_be_given(tmp_path: Path) -> None:
    """Transformers' class would take 1280 tokens where the published files say 16384."""
    folder = checkpoint(tmp_path, config(), min_pixels=3136)
    with pytest.raises(ValueError, match="max_pixels"):
        read_model_info(folder)
    assert read_model_info(folder, max_pixels=1_000_000).vision.max_pixels == 1_000_000


def test_what_is_not_served_is_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "mrope_section": [8, 12, 12]}}, "yarn"),
    ):
        changed = config()
        changed["text_config"] |= change
        with pytest.raises(ValueError, match=words):
            read_model_info(checkpoint(tmp_path, changed))
