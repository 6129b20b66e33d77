from __future__ import annotations

import pytest

from pipeline.parsers.base import Parser, Start, Thought
from pipeline.parsers.hermes import HermesParser
from pipeline.parsers.plain import PlainParser
from pipeline.parsers.thoughts import ThoughtParser
from tests.pipeline.parsers.reading import Read, check

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
CASES = {
    "opened by the prompt": (Start.THOUGHT, "Hm.\n\nSo?\n</think>\n\nYes. ", Read("Yes. ", [], "Hm.\n\nSo?")),
    "opened again": (Start.THOUGHT, "<think>\nHm.\n</think>\n\nYes.", Read("Yes.", [], "Hm.")),
    "opened by the model": (Start.EXPECTED, "<think>\nHm.\n</think>\n\nYes.", Read("Yes.", [], "Hm.")),
    "the opening tag forgotten": (Start.EXPECTED, "Hm.</think>Yes.", Read("Yes.", [], "Hm.")),
    "cut in the thought": (Start.EXPECTED, "<think>\nHm, < </thin", Read("", [], "Hm, < </thin")),
    "an empty thought": (Start.EXPECTED, "<think>\n\n</think>\n\nYes.", Read("Yes.", [], "")),
    "a model that may think": (Start.EITHER, "<think>Hm.</think>Yes.", Read("Yes.", [], "Hm.")),
    "a model that may think and does not": (Start.EITHER, " Yes <b> no", Read(" Yes <b> no", [], "")),
    "the beginning of a tag": (Start.EITHER, "<thi", Read("<thi", [], "")),
    "behind the thought": (
        Start.CONTENT,
        "\n<think>Hm.</think>Yes.",
        Read("\n<think>Hm.</think>Yes.", [], ""),
    ),
    "a tag in the answer": (Start.THOUGHT, "Hm.</think>a </think> b", Read("a </think> b", [], "Hm.")),
    "a call behind": (Start.THOUGHT, f"Hm.\n</think>\n\n{CALL}", Read("", [("f", "{}")], "Hm.")),
    "a call and text": (Start.THOUGHT, f"Hm.</think>\n\nOk:\n{CALL}", Read("Ok:", [("f", "{}")], "Hm.")),
    "a call in the thought ends it": (Start.THOUGHT, f"Hm.\n{CALL}", Read("", [("f", "{}")], "Hm.")),
    "nothing": (Start.THOUGHT, "\n", Read("", [], "")),
}


@pytest.mark.parametrize("name", CASES)
def test_thoughts_are_told_apart_wherever_the_text_is_cut(name: str) -> None:
    start, text, expected = CASES[name]

    def make() -> Parser:
        return ThoughtParser(start, HermesParser(), ("<tool_call>",))

    check(make, text, expected)


def test_thoughts_come_as_they_are_written() -> None:
    parser = ThoughtParser(Start.THOUGHT, PlainParser(), ())
    assert parser.add("Hm, ") == [Thought("Hm,")]
    assert parser.add("so") == [Thought(" so")]
