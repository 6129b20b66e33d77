"""Tools and thoughts through real processes: HTTP and ZeroMQ say the same."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer

from launcher.checkpoints import EMBEDDED
from pipeline.client.client import PipelineClient
from pipeline.wire.sampling import SamplingParams
from tests.integration.conftest import LIMITS
from tests.pipeline.parsers.reading import Read, together
from tests.servers import Server
from tests.tool_chats import BARE, HELLO, to_chat
from tools.kills_in_calls import kill_in_calls
from tools.processes import workers_of
from tools.random_checkpoint.tokenizer import chat_template

TOKENIZER = Tokenizer.from_file(str(EMBEDDED / "model" / "tokenizer.json"))
BUDGET = 6


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model, told that it thinks: without a budget it would never stop to."""
    folder = tmp_path_factory.mktemp("thinking") / "m"
    shutil.copytree(EMBEDDED / "model", folder)
    (folder / "chat_template.jinja").write_text(chat_template("qwen3_5"))
    with Server("--model", str(folder), "--served-model-name", "m", "--dtype", "float32", *LIMITS) as running:
        yield running


def create(server: Server, **fields: Any) -> Any:
    with server.client() as client:
        body = {"ignore_eos": True, **fields.pop("extra_body", {})}
        return client.chat.completions.create(
            model="", messages=[HELLO], temperature=0, extra_body=body, **fields
        )


def answer(server: Server, max_tokens: int = 24) -> Read:
    body = {"thinking_token_budget": BUDGET}
    message = create(server, max_tokens=max_tokens, extra_body=body).choices[0].message
    return Read(message.content or "", [], message.reasoning)


def test_a_thought_ends_with_its_budget(thinking: Server) -> None:
    told = answer(thinking)
    assert len(TOKENIZER.encode(told.thought, add_special_tokens=False).ids) <= BUDGET
    assert told.content
    body = {"chat_template_kwargs": {"enable_thinking": False}, "thinking_token_budget": BUDGET}
    message = create(thinking, max_tokens=12, extra_body=body).choices[0].message
    assert message.content
    assert not hasattr(message, "reasoning")


def test_zeromq_says_the_same(thinking: Server) -> None:
    """With tools, which the embedded model has never heard of, and without."""
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, thinking_budget=BUDGET)

    async def ask(*tools: dict[str, Any]) -> Read:
        async with PipelineClient(thinking.run_dir) as client:
            chat = to_chat([HELLO], list(tools))
            return together([event async for one in client.chat(chat, sampling) for event in one.events])

    assert asyncio.run(ask()) == answer(thinking)
    made = create(
        thinking, max_tokens=24, tools=[BARE], extra_body={"thinking_token_budget": BUDGET}
    ).choices[0]
    assert asyncio.run(ask(BARE)) == Read(made.message.content, [], made.message.reasoning)


def test_a_thought_ends_with_its_budget_after_a_death_too(thinking: Server) -> None:
    """The LLM dies once before the budget is spent, and once behind it."""
    whole = answer(thinking, 200)
    for num_pieces in (3, 40):
        with thinking.client() as client:
            body = {"thinking_token_budget": BUDGET, "ignore_eos": True}
            stream = client.chat.completions.create(
                model="m", messages=[HELLO], temperature=0, max_tokens=200, stream=True, extra_body=body
            )
            content = thought = ""
            for number, chunk in enumerate(stream):
                if number == num_pieces:
                    os.kill(workers_of(thinking.process.pid)["llm.0"], signal.SIGKILL)
                delta = chunk.choices[0].delta
                content += delta.content or ""
                thought += getattr(delta, "reasoning", None) or ""
        assert Read(content, [], thought) == whole
    thinking.children = workers_of(thinking.process.pid)


def test_a_template_refuses_what_it_cannot_show(thinking: Server) -> None:
    with thinking.client() as client, pytest.raises(Exception, match="No user query") as caught:
        client.chat.completions.create(model="m", messages=[{"role": "system", "content": "x"}])
    assert caught.value.param == "messages"  # type: ignore[attr-defined]


@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_model_is_made_to_call(thinking: Server, server: Server, choice: str) -> None:
    """Also behind its thought, and one that was never taught to call."""
    function = {"type": "function", "function": {"name": "light"}}
    tool = {
        "type": "function",
        "function": {
            "name": "light",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
                "required": ["on", "level"],
                "additionalProperties": False,
            },
        },
    }
    fields: dict[str, Any] = {
        "tools": [tool],
        "tool_choice": function if choice == "named" else choice,
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "extra_body": {"ignore_eos": False, "thinking_token_budget": BUDGET},
    }
    for one in (thinking, server):
        answered = create(one, **fields).choices[0]
        (call,) = answered.message.tool_calls
        assert (call.function.name, answered.finish_reason) == ("light", "tool_calls")
        arguments = json.loads(call.function.arguments)
        assert isinstance(arguments["on"], bool)
        assert arguments["level"] in (1, 2, 3)
        assert answered.message.content is None


async def test_a_call_under_a_grammar_is_what_it_was_though_the_llm_dies(server: Server) -> None:
    """A greedy one and a sampled one; `tools.kills_in_calls` kills 30 times."""
    found = await kill_in_calls(server.process.pid, f"{server.url}/v1", 2, 0.0, random.Random(1))
    assert found == {"equal": 2, "died": 2}
    server.children = workers_of(server.process.pid)


def test_a_structured_answer_comes_behind_the_thought(thinking: Server) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    format_ = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
    }
    body = {"ignore_eos": False, "thinking_token_budget": BUDGET}
    message = create(thinking, response_format=format_, max_tokens=100, extra_body=body).choices[0].message
    assert message.reasoning
    assert set(json.loads(message.content)) == {"on"}
