from __future__ import annotations

from pipeline.wire.generation import MmItem, Span
from workers.llm.cache.boundaries import MAX_FRAMES, Boundary, boundaries_of

TURN = 99


def prompt(*lengths: int) -> list[int]:
    """Turns of so many tokens."""
    return [token for length in lengths for token in (TURN, *[1] * (length - 1))]


def item(*spans: tuple[int, int]) -> MmItem:
    return MmItem(tuple(Span(*span) for span in spans), b"", b"", ())


def places(token_ids: list[int], *items: MmItem, max_count: int = 20) -> list[int]:
    return [found.position for found in boundaries_of(token_ids, items, TURN, 64, max_count)]


def test_the_system_prompt_the_last_turns_and_the_last_place_of_all() -> None:
    """The turns end at 300, 500, 700, 900, 1100 and 1170."""
    assert places(prompt(300, 200, 200, 200, 200, 70)) == [256, 640, 896, 1088, 1152]


def test_the_most_important_ones_are_kept() -> None:
    chat, picture = prompt(300, 200, 200, 200, 200, 70), item((310, 100))
    assert places(chat, picture) == [256, 384, 640, 896, 1088, 1152]
    assert places(chat, picture, max_count=4) == [256, 896, 1088, 1152]
    assert places(chat, picture, max_count=2) == [256, 1152]
    assert places(chat, picture, max_count=1) == [1152]


def test_a_text_without_turns_has_its_last_place() -> None:
    assert places([1] * 194) == [192]
    assert places([1] * 193) == [192]
    assert places([1] * 192) == [128], "the last token is left to compute"


def test_a_short_prompt_has_none() -> None:
    assert places([1] * 128) == []
    assert places(prompt(70, 50)) == []


def test_each_picture_has_its_end_and_none_is_behind_the_last_token() -> None:
    found = boundaries_of([1] * 1000, [item((10, 130)), item((300, 84))], None, 64, 20)
    assert found == [Boundary(128, False), Boundary(384, False), Boundary(960, False)]
    assert places([1] * 256, item((156, 100))) == [192]


def test_frames_share_few_places_among_them_the_last() -> None:
    frames = item(*((100 * number, 90) for number in range(40)))
    found = [one for one in boundaries_of([1] * 5000, [frames], None, 64, 20) if one.is_frame]
    assert len(found) == MAX_FRAMES
    assert found[-1].position == 3990 // 64 * 64


def test_a_place_that_is_no_frames_alone_is_no_frame() -> None:
    frames = item((0, 140), (140, 61))
    before = Boundary(128, True)
    assert boundaries_of([1] * 202, [frames], None, 64, 20) == [before, Boundary(192, False)]
    found = boundaries_of([1] * 300, [frames], None, 64, 20)
    assert found == [before, Boundary(192, True), Boundary(256, False)]
