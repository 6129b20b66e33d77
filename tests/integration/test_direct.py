"""Ways into the pipeline without HTTP: from threads, from other processes, and whole files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from launcher.checkpoints import EMBEDDED
from pipeline.client.blocking import BlockingClient
from pipeline.wire.clients import PROTOCOL_VERSION
from pipeline.wire.errors import PipelineError, RequestError
from pipeline.wire.packing import pack_int32
from pipeline.wire.prompts import Chat, ChatMessage, ImagePart, TextPart, Tokens
from pipeline.wire.sampling import Grammar, GrammarKind, SamplingParams
from tests.pictures import data_url, encode, scene
from tests.pipeline.parsers.reading import together
from tests.servers import Server

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CHILD = """
import sys
from pipeline.client.blocking import BlockingClient
from pipeline.wire.prompts import ChatMessage
from pipeline.wire.sampling import SamplingParams
with BlockingClient(sys.argv[1]) as client:
    for number in range(5):
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        pieces = client.generate([ChatMessage("user", f"Hello {number}")], sampling)
        print("".join(piece.text for piece in pieces).encode().hex())
"""


def test_threads_share_a_blocking_client(server: Server) -> None:
    messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
    with BlockingClient(server.run_dir) as client, ThreadPoolExecutor(8) as threads:

        def ask(number: int) -> str:
            return "".join(
                piece.text for piece in client.generate(messages, GREEDY, [encode(scene(number % 2))])
            )

        texts = list(threads.map(ask, range(16)))
        assert texts == texts[:2] * 8
        early = client.generate(messages, SamplingParams(max_tokens=900, ignore_eos=True), [encode(scene(1))])
        assert next(early).num_output_tokens >= 1
        early.close()  # type: ignore[attr-defined]
        with pytest.raises(RequestError, match="temperature"):
            list(client.generate(messages, SamplingParams(temperature=-1), [encode(scene(1))]))


def test_a_picture_comes_with_a_prompt_of_ids_as_with_a_chat(server: Server) -> None:
    """A second time even its KV is there."""
    messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it, in ids?")))]
    asked = msgspec.structs.replace(GREEDY, return_token_ids=True)
    with BlockingClient(server.run_dir) as client:
        told = list(client.generate(messages, asked, [encode(scene(9))]))
        prompt = told[0].prompt_token_ids
        url = ImagePart(url=data_url(scene(9)))
        by_ids = list(client.generate(Tokens(pack_int32(prompt), (url,)), asked))
        assert [piece.token_ids for piece in by_ids] == [piece.token_ids for piece in told]
        assert by_ids[0].prompt_token_ids == prompt
        assert by_ids[0].num_cached_tokens >= len(prompt) // 16 * 16 - 16
        with pytest.raises(RequestError, match="no media fill"):
            list(client.generate(Tokens(pack_int32(prompt)), asked))


def test_no_pipeline_is_told_and_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no pipeline answered"):
        BlockingClient(tmp_path).start(0.2)


def test_many_client_processes_at_once_get_what_one_gets(server: Server) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(server.run_dir)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert len(outputs[0].split()) == 5
    assert set(outputs) == {outputs[0]}


def request_line(number: int, **fields: Any) -> str:
    content: Any = f"Count from {number}"
    if number % 3 == 0:
        content = [
            {"type": "image_url", "image_url": {"url": data_url(scene(number))}},
            {"type": "text", "text": "What is it?"},
        ]
    body = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 20,
        "ignore_eos": True,
        **fields,
    }
    return json.dumps(
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    )


def batch(server: Server, source: Path, target: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tools.batch",
        "--run-dir",
        str(server.run_dir),
        str(source),
        str(target),
        "--concurrency",
        "8",
    ]


def test_a_batch_keeps_its_order_and_tells_errors_line_by_line(server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [
        "no json", json.dumps({"custom_id": "other", "url": "/v1/embeddings", "body": {}}),
        request_line(91, temperature=-1),
        request_line(92, model="other"), request_line(93, stream=True),
    ]  # fmt: skip
    lines = [
        *(request_line(number) for number in range(12)),
        *bad,
        request_line(12, max_tokens=1),
        request_line(13, n=2, logprobs=True),
    ]
    source.write_text("\n".join(lines) + "\n\n")
    done = subprocess.run(batch(server, source, target), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "5 lines were answered with an error" in done.stderr
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    ids = [
        *(f"line-{number}" for number in range(12)),
        None,
        "other",
        "line-91",
        "line-92",
        "line-93",
        "line-12",
        "line-13",
    ]
    assert [answer["custom_id"] for answer in answers] == ids
    for answer in [*answers[:12], *answers[17:]]:
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        assert answer["response"]["body"]["choices"][0]["message"]["content"]
    assert [answer["error"]["code"] for answer in answers[12:14]] == ["invalid_line", "invalid_url"]
    assert [answer["response"]["status_code"] for answer in answers[14:17]] == [400, 404, 400]
    assert answers[14]["response"]["body"]["error"]["param"] == "temperature"
    assert len(answers[18]["response"]["body"]["choices"]) == 2
    again = subprocess.run(batch(server, source, target), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert len(target.read_text().splitlines()) == len(answers), "what is answered is not asked again"


def test_a_killed_batch_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    source, target, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_text("".join(request_line(number, max_tokens=30) + "\n" for number in range(40)))
    subprocess.run(batch(server, source, whole), check=True, capture_output=True, timeout=120)
    for _ in range(2):
        process = subprocess.Popen(batch(server, source, target), stderr=subprocess.DEVNULL)
        before, end = len(target.read_bytes()) if target.exists() else 0, time.monotonic() + 60
        while (len(target.read_bytes()) if target.exists() else 0) == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with target.open("ab") as file:
        file.write(b'{"id": "half a li')
    subprocess.run(batch(server, source, target), check=True, capture_output=True, timeout=120)

    def texts(path: Path) -> list[tuple[str, str]]:
        answers = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            (answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])
            for answer in answers
        ]

    assert [name for name, _ in texts(target)] == [f"line-{number}" for number in range(40)]
    same = [ours == theirs for ours, theirs in zip(texts(target), texts(whole), strict=True)]
    assert sum(same) >= 38, "greedy answers differ by rounding at most"


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client in JavaScript, with its packages."""
    folder = tmp_path_factory.mktemp("js")
    for name in ("client.mjs", "package.json"):
        shutil.copy(Path(__file__).parents[1] / "js" / name, folder)
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel", "error"],
        cwd=folder,
        check=True,
        timeout=120,
    )
    return folder


def run_javascript(folder: Path, server: Server, picture: Path, *more: str) -> Any:
    command = ["node", "client.mjs", str(server.run_dir), "What is it?", str(picture), *more]
    return json.loads(
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout
    )


def test_a_client_in_another_language_gets_the_same(server: Server, javascript: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(encode(scene(1)))
    theirs = run_javascript(javascript, server, picture, "3")
    with BlockingClient(server.run_dir) as client:
        messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
        pieces = list(
            client.generate(
                messages, SamplingParams(temperature=1, seed=1, max_tokens=16, n=3), [picture.read_bytes()]
            )
        )
    assert theirs["prompt_tokens"] == pieces[0].num_prompt_tokens
    for index, choice in enumerate(theirs["choices"]):
        ours = [piece for piece in pieces if piece.index == index]
        assert choice["token_ids"] == [token for piece in ours for token in piece.token_ids]
        assert choice["finish_reason"] == ours[-1].finish_reason
    for text, expected in _forms_of_answers(server, javascript, picture):
        assert text == expected
    refused = run_javascript(javascript, server, picture, "1", "99")
    ours = f"the pipeline speaks protocol {PROTOCOL_VERSION}"
    assert refused["error"]["message"] == f"the client speaks protocol 99, {ours}"


def _forms_of_answers(server: Server, javascript: Path, picture: Path) -> Iterator[tuple[str, str]]:
    """What both clients get with a schema, and with a function that must be called: each time their texts."""
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "model" / "tokenizer.json"))
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    messages = (ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?"))),)
    sampling = SamplingParams(temperature=1, seed=1, max_tokens=200)
    by_schema = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    named, protocol = {"type": "function", "function": {"name": "look"}}, str(PROTOCOL_VERSION)
    for form, chat, grammar, choice in (
        ({"schema": schema}, Chat(messages), by_schema, None),
        ({"tool": tool}, Chat(messages, tools=json.dumps([tool]).encode()), None, named),
    ):
        (answer,) = run_javascript(javascript, server, picture, "1", protocol, json.dumps(form))["choices"]
        assert answer["finish_reason"] == "stop"
        with BlockingClient(server.run_dir) as client:
            asked = msgspec.structs.replace(sampling, grammar=grammar)
            told = list(client.chat(chat, asked, [picture.read_bytes()], tool_choice=choice))
        read = together([event for one in told for event in one.events])
        given = read.content if choice is None else dict(read.calls)["look"]
        assert json.loads(given)["colour"] in ("red", "blue")
        text = tokenizer.decode(answer["token_ids"], skip_special_tokens=False)
        yield text.removesuffix("<|im_end|>"), "".join(one.piece.text for one in told)
