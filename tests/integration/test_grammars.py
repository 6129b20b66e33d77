"""Structured output through real processes: every kind of grammar, deaths of workers, hostile grammars."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from tokenizers import Tokenizer

from launcher.checkpoints import EMBEDDED
from pipeline.client.client import PipelineClient
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ChatMessage
from pipeline.wire.sampling import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.integration.conftest import LIMITS
from tests.servers import Server
from tools.processes import workers_of

GREEDY = SamplingParams(temperature=0, max_tokens=400)
MESSAGES = [ChatMessage("user", "What is it?")]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
LIST = {
    "type": "array",
    "items": {"type": "integer", "minimum": 1, "maximum": 99},
    "minItems": 30,
    "maxItems": 30,
}
TREE = {
    "$defs": {
        "node": {
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<call>",
        "content": {
            "type": "json_schema",
            "json_schema": {"properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
        },
        "end": "</call>",
    },
}


def of(kind: GrammarKind, source: Any = "", **fields: Any) -> SamplingParams:
    text = source if isinstance(source, str) else json.dumps(source)
    return msgspec.structs.replace(GREEDY, grammar=Grammar(kind, text), **fields)


def schema(source: Any, **fields: Any) -> SamplingParams:
    return of(GrammarKind.JSON_SCHEMA, source, **fields)


async def answers(
    client: PipelineClient,
    sampling: SamplingParams,
    request_id: str | None = None,
    on_piece: Callable[[int], None] = lambda count: None,
) -> dict[int, tuple[str, FinishReason | None]]:
    texts: dict[int, tuple[str, FinishReason | None]] = {}
    count = 0
    async for piece in client.generate(MESSAGES, sampling, (), request_id):
        texts[piece.index] = texts.get(piece.index, ("", None))[0] + piece.text, piece.finish_reason
        count += 1
        on_piece(count)
    return texts


async def answer(client: PipelineClient, sampling: SamplingParams, *args: Any) -> str:
    ((text, reason),) = (await answers(client, sampling, *args)).values()
    assert reason is FinishReason.STOP, text
    return text


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--dtype", "float32", "--tp", "2", "--overlap", "on", *LIMITS) as made:
        yield made
        made.children = workers_of(made.process.pid)


async def test_each_kind_gives_what_it_says(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        for source in (PERSON, LIST, TREE):
            text = await answer(client, schema(source, max_tokens=1500))
            jsonschema.validate(json.loads(text), source)
        token_id = Tokenizer.from_file(str(EMBEDDED / "model" / "tokenizer.json")).token_to_id
        bias = {token_id("}"): 100.0, token_id('{"'): -100.0, token_id('"'): -100.0}
        assert json.loads(await answer(client, of(GrammarKind.JSON_OBJECT, logit_bias=bias))) == {}
        assert re.fullmatch(
            r"[a-f]{3}-\d{2,4}", await answer(client, of(GrammarKind.REGEX, r"[a-f]{3}-\d{2,4}"))
        )
        names = ["a circle", 'a "square"\n', "Ä€🙂"]
        assert await answer(client, of(GrammarKind.CHOICE, names)) in names
        assert await answer(client, of(GrammarKind.CHOICE, names[2:])) == names[2]
        ebnf = 'root ::= item ("," item)* "."\nitem ::= "one" | "two"'
        text = await answer(client, of(GrammarKind.EBNF, ebnf, logit_bias={}, frequency_penalty=2.0))
        assert re.fullmatch(r"(one|two)(,(one|two))*\.", text)
        text = await answer(client, of(GrammarKind.STRUCTURAL_TAG, TAG))
        assert json.loads(text.removeprefix("<call>").removesuffix("</call>"))["x"] in (1, 2)


async def test_choices_of_one_request_and_logprobs(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        sampling = schema(PERSON, n=4, temperature=1.5, seed=3, logprobs=2)
        texts = await answers(client, sampling)
        assert len(texts) == 4
        assert len({text for text, _ in texts.values()}) > 1
        for text, reason in texts.values():
            assert reason is FinishReason.STOP
            jsonschema.validate(json.loads(text), PERSON)


async def test_two_at_once_beside_one_without(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        wanted = [schema(PERSON), msgspec.structs.replace(GREEDY, max_tokens=60), schema(LIST)]
        alone = [await answers(client, sampling) for sampling in wanted]
        assert await asyncio.gather(*(answers(client, sampling) for sampling in wanted)) == alone


async def test_a_request_goes_on_within_its_grammar_when_the_llm_dies(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        whole = await answer(client, schema(LIST))

        def kill(count: int) -> None:
            if count == 20:
                os.kill(workers_of(server.process.pid)["llm.0"], signal.SIGKILL)

        assert await answer(client, schema(LIST), "killed", kill) == whole
        assert client.counters["resubmitted"] == 1


def compilers(server: Server) -> list[int]:
    """The processes of preprocess that compile grammars."""
    parent = workers_of(server.process.pid)["preprocess.0"]
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
            except OSError:
                continue
            if b"grammar_process" in line and int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


async def test_the_death_of_a_compiler_is_survived(server: Server) -> None:
    slow = schema({"properties": {f"p{number}": {"type": "string"} for number in range(150)}}, max_tokens=5)
    async with PipelineClient(server.run_dir) as client:
        await answer(client, of(GrammarKind.REGEX, "[a-c]"))
        asked = asyncio.ensure_future(answers(client, slow))
        await asyncio.sleep(0.05)
        victims = compilers(server)
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert (await asked)[0][1] is FinishReason.LENGTH
        assert await answer(client, of(GrammarKind.REGEX, "[d-f]")) in "def"


HOSTILE = {
    "invalid JSON": (of(GrammarKind.JSON_SCHEMA, '{"type":'), "not JSON"),
    "an empty enum": (schema({"enum": []}), "enum"),
    "bounds": (
        schema({"properties": {"a": {"type": "integer", "minimum": 3, "maximum": 1}}}),
        "#/properties/a",
    ),
    "a keyword": (schema({"properties": {"a": {"not": {}}}}), "'not' of the JSON schema at #/properties/a"),
    "nesting": (of(GrammarKind.JSON_SCHEMA, '{"items":' * 9000 + "{}" + "}" * 9000), "deep"),
    "brackets": (of(GrammarKind.EBNF, "root ::= " + "(" * 90_000 + '"a"' + ")" * 90_000), "deep"),
    "recursion": (of(GrammarKind.EBNF, 'root ::= root "a"'), "allows no answer"),
    "a reference": (schema({"$ref": "#"}), "JSON schema"),
    "a regular expression": (of(GrammarKind.REGEX, "[a"), "position 3"),
    "EBNF": (of(GrammarKind.EBNF, "root ::= foo"), "line 1, column 10"),
    "a tag": (of(GrammarKind.STRUCTURAL_TAG, {"type": "structural_tag"}), "format"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_cannot_be_served_is_refused_and_names_the_part(server: Server, name: str) -> None:
    sampling, part = HOSTILE[name]
    async with PipelineClient(server.run_dir) as client:
        with pytest.raises(RequestError) as error:
            await answers(client, sampling)
        assert error.value.info.status == 400
        assert error.value.info.field == "response_format"
        assert part in error.value.info.message


@pytest.mark.parametrize(
    "sampling",
    [
        of(GrammarKind.REGEX, "(a{1,1000}){1,1000}", max_tokens=5),
        schema({"enum": [f"value {number}" for number in range(10_000)]}, max_tokens=5),
    ],
)
async def test_large_grammars_are_served(server: Server, sampling: SamplingParams) -> None:
    async with PipelineClient(server.run_dir) as client:
        assert await answers(client, sampling)
