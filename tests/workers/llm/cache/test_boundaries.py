from __future__ import annotations

from pipeline.wire.generation import MmItem, Span
from workers.llm.cache.boundaries import MAX_FRAMES, Boundary, boundaries_of

TURN = 99


def prompt(*lengths: int) -> list[int]:
    """Turns of so many tokens."""
    return [token for length in lengths for token in (TURN, *[1] * (length - 1))]


def item(*spans: tuple[int, int]) -> MmItem:
    return MmItem(tuple(Span(*span) for span in spans), b"", b"", ())


def places(token_ids: list[int], *items: MmItem, multiple: int = 64) -> list[int]:
    return [found.position for found in boundaries_of(token_ids, items, TURN, multiple)]


def test_the_system_prompt_the_last_turns_and_the_last_place_of_all() -> None:
    lengths = [300, 200, 200, 200, 200, 70]
    assert places(prompt(*lengths)) == [256, 640, 896, 1088, 1152]
    assert [end // 64 * 64 for end in (300, 700, 900, 1100, 1169)] == [256, 640, 896, 1088, 1152]


def test_a_text_without_turns_has_its_last_place() -> None:
    assert places([1] * 130) == [128]
    assert places([1] * 129) == [128]
    assert places([1] * 128) == [64], "the last token is left to compute"
    assert places([1] * 64) == []


def test_each_picture_has_its_end() -> None:
    found = boundaries_of([1] * 1000, [item((10, 100)), item((300, 84))], None, 64)
    assert found == [Boundary(64, False), Boundary(384, False), Boundary(960, False)]


def test_frames_share_few_places_among_them_the_last() -> None:
    frames = item(*((100 * number, 90) for number in range(40)))
    found = [one for one in boundaries_of([1] * 5000, [frames], None, 64) if one.is_frame]
    assert len(found) <= MAX_FRAMES
    assert found[-1].position == 3990 // 64 * 64


def test_a_place_that_is_no_frames_alone_is_no_frame() -> None:
    frames = item((0, 100), (100, 101))
    assert boundaries_of([1] * 202, [frames], None, 64) == [Boundary(64, True), Boundary(192, False)]
