from __future__ import annotations

import pytest

from pipeline.parsers.base import Parser, Thought, ThoughtStart
from pipeline.parsers.hermes import HermesParser
from pipeline.parsers.plain import PlainParser
from pipeline.parsers.thoughts import ThoughtParser
from tests.pipeline.parsers.reading import Read, check

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
CASES = {
    "opened by the prompt": (
        ThoughtStart.THOUGHT,
        "Hm.\n\nSo?\n</think>\n\nYes. ",
        Read("Yes. ", [], "Hm.\n\nSo?"),
    ),
    "opened again": (ThoughtStart.THOUGHT, "<think>\nHm.\n</think>\n\nYes.", Read("Yes.", [], "Hm.")),
    "opened by the model": (ThoughtStart.EXPECTED, "<think>\nHm.\n</think>\n\nYes.", Read("Yes.", [], "Hm.")),
    "the opening tag forgotten": (ThoughtStart.EXPECTED, "Hm.</think>Yes.", Read("Yes.", [], "Hm.")),
    "cut in the thought": (ThoughtStart.EXPECTED, "<think>\nHm, < </thin", Read("", [], "Hm, < </thin")),
    "an empty thought": (ThoughtStart.EXPECTED, "<think>\n\n</think>\n\nYes.", Read("Yes.", [], "")),
    "a model that may think": (ThoughtStart.EITHER, "<think>Hm.</think>Yes.", Read("Yes.", [], "Hm.")),
    "a model that may think and does not": (ThoughtStart.EITHER, " Yes <b> no", Read(" Yes <b> no", [], "")),
    "the beginning of a tag": (ThoughtStart.EITHER, "<thi", Read("<thi", [], "")),
    "behind the thought": (
        ThoughtStart.CONTENT,
        "\n<think>Hm.</think>Yes.",
        Read("\n<think>Hm.</think>Yes.", [], ""),
    ),
    "a tag in the answer": (ThoughtStart.THOUGHT, "Hm.</think>a </think> b", Read("a </think> b", [], "Hm.")),
    "a call behind": (ThoughtStart.THOUGHT, f"Hm.\n</think>\n\n{CALL}", Read("", [("f", "{}")], "Hm.")),
    "a call and text": (
        ThoughtStart.THOUGHT,
        f"Hm.</think>\n\nOk:\n{CALL}",
        Read("Ok:", [("f", "{}")], "Hm."),
    ),
    "a call in the thought ends it": (ThoughtStart.THOUGHT, f"Hm.\n{CALL}", Read("", [("f", "{}")], "Hm.")),
    "nothing": (ThoughtStart.THOUGHT, "\n", Read("", [], "")),
}


@pytest.mark.parametrize("name", CASES)
def test_thoughts_are_told_apart_wherever_the_text_is_cut(name: str) -> None:
    start, text, expected = CASES[name]

    def make() -> Parser:
        return ThoughtParser(start, HermesParser(), ("<tool_call>",))

    check(make, text, expected)


def test_thoughts_come_as_they_are_written() -> None:
    parser = ThoughtParser(ThoughtStart.THOUGHT, PlainParser(), ())
    assert parser.add("Hm, ") == [Thought("Hm,")]
    assert parser.add("so") == [Thought(" so")]
