"""Which forms a template shows, where its prompt leaves the model, and what grammars accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xgrammar

from launcher.checkpoints import EMBEDDED
from pipeline.families.chat_template import ChatTemplate
from pipeline.parsers.base import Json, ThoughtStart, Tool
from pipeline.parsers.forms import ChatForms
from pipeline.parsers.grammar import (
    behind_thought,
    format_of,
    optional_calls,
    required_calls,
    structural_tag,
)
from pipeline.parsers.hermes import HermesForm
from pipeline.parsers.plain import PlainParser
from pipeline.parsers.registry import find_tool_form
from pipeline.parsers.xml import XmlForm
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import Chat, ChatMessage, Text
from pipeline.wire.sampling import Grammar, GrammarKind
from tests.pipeline.parsers.reading import read
from tests.tool_chats import HELLO, TOOLS, WEATHER, to_chat
from tools.random_checkpoint.tokenizer import chat_template

OWN = Path(__file__).parents[2] / "templates"
TOOL = Tool("weather", WEATHER["function"]["parameters"], True)
OTHER = Tool("now", {}, True)


def forms(name: str, **names: str) -> ChatForms:
    own = OWN / f"{name}.jinja"
    return ChatForms(ChatTemplate(own.read_text() if own.exists() else chat_template(name)), **names)


@pytest.mark.parametrize(
    ("name", "calls", "thinks"),
    [
        ("qwen2_vl", "hermes", False),
        ("qwen3_vl", "hermes", False),
        ("qwen3", "hermes", True),
        ("qwen3_5", "qwen3_xml", True),
    ],
)
def test_the_template_shows_the_forms(name: str, calls: str, thinks: bool) -> None:
    found = forms(name)
    assert found.calls is not None
    assert calls in found.calls.names
    assert (found.thoughts is not None) == thinks


def test_a_name_wins_over_the_template() -> None:
    found = forms("qwen3_5", tool_parser="hermes", reasoning_parser="none")
    assert isinstance(found.calls, HermesForm)
    assert found.thoughts is None
    assert forms("qwen3_5", tool_parser="none").calls is None


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [
        ("qwen3_5", {}, ThoughtStart.THOUGHT),
        ("qwen3_5", {"enable_thinking": False}, ThoughtStart.CONTENT),
        ("qwen3", {}, ThoughtStart.EXPECTED),
        ("qwen3", {"enable_thinking": True}, ThoughtStart.EXPECTED),
        ("qwen3", {"enable_thinking": False}, ThoughtStart.CONTENT),
        ("qwen3_vl", {"enable_thinking": True}, ThoughtStart.CONTENT),
    ],
)
def test_where_the_prompt_leaves_the_model(name: str, options: dict[str, Any], start: ThoughtStart) -> None:
    assert forms(name).start(to_chat([HELLO], None, template_options=options)) is start


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("Hm", ThoughtStart.CONTENT),
        ("<think>\nHm", ThoughtStart.THOUGHT),
        ("<think>Hm</think>So", ThoughtStart.CONTENT),
    ],
)
def test_where_a_continued_message_leaves_the_model(text: str, start: ThoughtStart) -> None:
    messages = (ChatMessage("user", "x"), ChatMessage("assistant", text))
    chat = Chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert forms("qwen3_5").start(chat) is start
    assert forms("qwen3_5").start(Chat(messages, add_generation_prompt=False)) is ThoughtStart.EITHER


def test_a_template_that_mentions_thoughts_only_may_think() -> None:
    found = ChatForms(ChatTemplate("{% if '</think>' in messages[0].content %}{% endif %}x"))
    assert found.start(to_chat([HELLO])) is ThoughtStart.EITHER


def test_calls_are_read_only_where_there_are_tools() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    found = forms("qwen3_vl")
    assert read(found.parser(to_chat([HELLO], TOOLS)), [call]).calls == [("now", "{}")]
    assert read(found.parser(to_chat([HELLO])), [call]).content == call
    assert isinstance(found.parser(Text("x")), PlainParser)


class Accepts:
    """Whether a grammar accepts a whole text, and whether it must end there."""

    def __init__(self, grammar: Grammar) -> None:
        info = xgrammar.TokenizerInfo([chr(sign) for sign in range(128)] + ["</s>"], stop_token_ids=[128])
        compiled = xgrammar.GrammarCompiler(info).compile_structural_tag(grammar.source)
        self._compiled = compiled

    def __call__(self, text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(self._compiled)
        return matcher.accept_string(text) and matcher.accept_token(128)


def accepts(inner: Json) -> Accepts:
    return Accepts(structural_tag(inner))


HERMES = [
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome", "days": 2}}\n</tool_call>',
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
]
HERMES_BAD = '<tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>'
XML = [
    "<tool_call>\n<function=weather>\n<parameter=town>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>",
    "<tool_call>\n<function=now>\n\n</function>\n</tool_call>",
]
XML_BAD = "<tool_call>\n<function=weather>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
KINDS = pytest.mark.parametrize(
    ("form", "calls", "bad"), [(HermesForm(), HERMES, HERMES_BAD), (XmlForm(), XML, XML_BAD)]
)


@KINDS
def test_required_calls(form: Any, calls: list[str], bad: str) -> None:
    several = accepts(required_calls(form, [TOOL, OTHER], True))
    single = accepts(required_calls(form, [TOOL, OTHER], False))
    named = accepts(required_calls(form, [TOOL], False))
    for call in calls:
        assert several(call)
        assert single(call)
    assert several("\n".join(calls))
    assert not single("\n".join(calls))
    assert named(calls[0])
    assert not named(calls[1])
    for wrong in (bad, "text", f"text {calls[0]}", ""):
        assert not several(wrong)
        assert not single(wrong)


@KINDS
def test_what_a_grammar_accepts_is_read(form: Any, calls: list[str], bad: str) -> None:
    told = read(form.parser([TOOL, OTHER]), ["\n".join(calls)])
    assert told.content == ""
    assert [(name, json.loads(arguments)) for name, arguments in told.calls] == [
        ("weather", {"town": "Rome", "days": 2}),
        ("now", {}),
    ]


@KINDS
def test_optional_calls(form: Any, calls: list[str], bad: str) -> None:
    strict = accepts(optional_calls(form, [TOOL, OTHER], True))
    free = accepts(optional_calls(form, [Tool("weather", TOOL.parameters), OTHER], True))
    assert strict("Just text.")
    assert strict(f"Well. {calls[0]}")
    assert strict("\n".join(calls))
    assert not strict(bad)
    assert free(bad)
    single = accepts(optional_calls(form, [TOOL, OTHER], False))
    assert single(f"Well. {calls[0]}")
    assert not single("\n".join(calls))


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar(GrammarKind.JSON_OBJECT), '{"a": 1}', "1"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}'), "12", '"x"'),
        (Grammar(GrammarKind.REGEX, "[ab]+"), "abba", "abc"),
        (Grammar(GrammarKind.CHOICE, '["yes", "no"]'), "no", "maybe"),
        (Grammar(GrammarKind.EBNF, 'root ::= "x" | "y"'), "y", "z"),
        (structural_tag({"type": "const_string", "value": "hi"}), "hi", "ho"),
    ],
    ids=lambda value: value.kind.value if isinstance(value, Grammar) else None,
)
def test_a_grammar_begins_behind_the_thought(grammar: Grammar, good: str, bad: str) -> None:
    form = forms("qwen3_5").thoughts
    inner = format_of(grammar)
    assert behind_thought(inner, form, ThoughtStart.CONTENT) is inner
    assert behind_thought(inner, None, ThoughtStart.THOUGHT) is inner
    opened = accepts(behind_thought(inner, form, ThoughtStart.THOUGHT))
    for prefix in ("Hm, {so}.\n</think>\n\n", "</think>", "Hm</think>\n\n"):
        assert opened(prefix + good)
        assert not opened(prefix + bad)
    assert not opened(good)
    expected = accepts(behind_thought(inner, form, ThoughtStart.EXPECTED))
    assert expected(f"<think>\nHm</think>\n\n{good}")
    assert not expected(f"Hm</think>{good}")


def test_the_embedded_model_calls_under_a_grammar() -> None:
    found = ChatForms.read(EMBEDDED / "model")
    assert isinstance(found.calls, HermesForm)
    assert found.calls is find_tool_form("auto", "")


def test_functions_are_read_once_for_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read for each of 16 choices, 25 MB of functions took 2 s of the endpoint's event loop."""
    read: list[Chat] = []
    monkeypatch.setattr("pipeline.parsers.forms.tools_of", lambda chat: read.append(chat) or [])
    make = ChatForms(None).parser_maker(Chat((ChatMessage("user", "Hi"),), tools=b"[]"))
    assert make() is not make()
    assert len(read) == 1


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(GrammarKind.JSON_SCHEMA, "{bad", "guided_json"),
        Grammar(GrammarKind.STRUCTURAL_TAG, '{"structures": []}', "guided_json"),
        Grammar(GrammarKind.STRUCTURAL_TAG, "[1]", "guided_json"),
    ],
)
def test_a_grammar_that_is_not_what_it_says_is_refused_by_the_clients_name(grammar: Grammar) -> None:
    with pytest.raises(RequestError) as caught:
        format_of(grammar)
    assert caught.value.info.field == "guided_json"
