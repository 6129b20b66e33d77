"""What the launcher's notice says of the embedded model, what docs/embedded-model.md measured, and what it is
to reach, agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.checkpoints import NOTICE
from tools.tiny_model.exams import FIXED_WORDINGS, SAME_CONTENT, SKILLS

PAGE = Path(__file__).parents[2] / "docs" / "embedded-model.md"
ROW = re.compile(r"^\| ([\w -]+) \|((?: (?:[\d.]+% of \d+)? ?\|){3})$", re.MULTILINE)
CELL = re.compile(r"([\d.]+)% of (\d+)")
TO_REACH = {
    "shape": 97, "colour": 97, "position": 97, "count 0-5": 95, "digits": 90, "follow-up": 90,
    "compare two": 90, "blank": 90,
}  # fmt: skip
TO_BE_NAMED = 80
NAMED = {
    "shapes with their colors": ("shape", "colour"),
    "sizes": ("size",),
    "places and number": ("position", "relation", "count 0-5", "count 6-9", "count alike"),
    "printed numbers and words": ("digits", "words", "colour of print"),
    "clothing": ("clothing",),
    "emoji": ("emoji",),
    "bar charts": ("charts",),
    "what differs between pictures": ("compare two", "compare three"),
    "what happens in short videos": ("video direction", "video what moves", "video order", "video change"),
    "to questions beyond these it mostly answers that it does not know": ("unknown", "unknown of it"),
}


@pytest.fixture(scope="module")
def table() -> dict[str, list[tuple[float, int]]]:
    """Of each skill, for each split that it has: how many percent were right, of how many."""
    return {
        name: [(float(share), int(count)) for share, count in CELL.findall(cells)]
        for name, cells in ROW.findall(PAGE.read_text())
    }


def _num_splits(skill: str) -> int:
    return 3 - (skill in SAME_CONTENT) - (skill in FIXED_WORDINGS)


def test_the_table_has_every_skill(table: dict[str, list[tuple[float, int]]]) -> None:
    assert list(table) == list(SKILLS)
    assert {skill: len(columns) for skill, columns in table.items()} == {
        skill: _num_splits(skill) for skill in SKILLS
    }
    assert min(count for columns in table.values() for _, count in columns) >= 150


@pytest.mark.parametrize("skill", TO_REACH)
def test_what_was_to_be_reached_is(skill: str, table: dict[str, list[tuple[float, int]]]) -> None:
    assert min(share for share, _ in table[skill]) >= TO_REACH[skill]


def test_the_notice_names_nothing_that_is_not_good_enough(table: dict[str, list[tuple[float, int]]]) -> None:
    named = re.split(r", |; ", NOTICE.partition(": ")[2])
    assert named == list(NAMED)
    for skill in (skill for skills in NAMED.values() for skill in skills):
        assert min(share for share, _ in table[skill]) >= TO_BE_NAMED, skill
