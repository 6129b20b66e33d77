from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.families import ImageSize, MediaInfo, ModelInfo, PlacedMedia, Placeholders, SampledFrames
from pipeline.families import registry as families
from pipeline.parsers.forms import ChatForms
from pipeline.parsers.plain import PlainParser
from pipeline.wire.generation import Span
from pipeline.wire.prompts import Chat, Text
from tests.toy_family.checkpoint import install_toy, make_toy
from tests.toy_family.family import BETWEEN, ToyFamily
from tests.workers.api import toys

CHAT = Chat(())


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return ToyFamily().read(make_toy(tmp_path_factory.mktemp("toy") / "model", True), None, None)


def film(info: ModelInfo, numbers: tuple[int, ...], source_fps: float | None) -> MediaInfo:
    grid = info.vision.grid_of(ImageSize(60, 90), len(numbers))
    return MediaInfo(grid, SampledFrames(numbers, 100, source_fps))


def test_its_entry_point_makes_it_known(
    info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(install_toy(tmp_path / "packages"))
    for lookup in (families._entry_points, families.find_family):
        lookup.cache_clear()
    try:
        assert families.read_model_info(info.folder).vision == info.vision
    finally:
        for lookup in (families._entry_points, families.find_family):
            lookup.cache_clear()


def test_a_checkpoint_says_whether_it_thinks(info: ModelInfo, tmp_path: Path) -> None:
    assert info.reasoning_parser == "none"
    folder = make_toy(tmp_path / "thinking", True)
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{{ '<think>' }}")
    thinking = ToyFamily().read(folder, None, None)
    with toys.installed():
        forms = ChatForms.read(folder, reasoning_parser=thinking.reasoning_parser)
        assert type(forms.parser(CHAT)).__name__ == "ThoughtParser"
        assert isinstance(forms.parser(Text("<think>")), PlainParser), "a text is continued, not answered"


@pytest.mark.parametrize(
    ("num_frames", "counts"),
    [(1, (3, 3)), (2, (6, 6)), (5, (15, 15))],
)
def test_an_item_is_two_runs_of_whole_rows(
    num_frames: int, counts: tuple[int, int], info: ModelInfo
) -> None:  # fmt: skip
    media = film(info, tuple(range(num_frames)), None)
    expected = Placeholders(counts[0]), BETWEEN, Placeholders(counts[1])
    assert info.family.segments(media, info) == expected


def test_a_picture_of_one_row_is_one_run(info: ModelInfo) -> None:
    media = MediaInfo(info.vision.grid_of(ImageSize(30, 120)))
    assert info.family.segments(media, info) == (Placeholders(4),)


def test_positions_tell_the_time_between_frames(info: ModelInfo) -> None:
    media = film(info, (0, 6), 12.0)  # half a second: two positions
    (rows, delta) = info.family.positions(20, [PlacedMedia(media, (Span(2, 6), Span(10, 6)))], info)
    first = [[2, 2, 2, 2, 2, 2], [2, 2, 2, 3, 3, 3], [2, 3, 4, 2, 3, 4]]
    assert rows[:, :2].tolist() == [[0, 1]] * 3
    assert rows[:, 2:8].tolist() == first
    assert rows[:, 8:10].tolist() == [[5, 6]] * 3
    assert rows[:, 10:16].tolist() == [[place + 5 for place in row] for row in first]
    assert rows[:, 16:].tolist() == [[10, 11, 12, 13]] * 3
    assert delta == -6
    (rows, _) = info.family.positions(20, [PlacedMedia(media, (Span(2, 9), Span(12, 3)))], info)
    assert rows[0, 2:11].tolist() == [2] * 6 + [4] * 3, "a run over both frames"


def test_only_the_prefix_cache_tells_rates_apart(info: ModelInfo) -> None:
    seen = b"content"
    keys = [info.family.kv_hash(seen, film(info, (0, 1, 2), fps), info) for fps in (None, 1.0, 2.0, 2.01)]
    assert len(set(keys)) == 3, "what leads to the same positions is the same"
    assert keys[2] == keys[3]


def test_frames_are_spread_over_the_video(info: ModelInfo) -> None:
    assert info.family.sample_frames(16, 8.0, 4.0, 1, 64, info) == list(range(0, 16, 2))
    assert info.family.sample_frames(3, 8.0, 30.0, 1, 2, info) == [0, 1]


def test_a_frame_is_no_larger_than_a_picture(info: ModelInfo) -> None:
    assert info.family.read(info.folder, None, 10_000).video.max_pixels == 10_000
