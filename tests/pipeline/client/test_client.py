"""The client library against a pipeline played by the test, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tokenizers import Tokenizer

from launcher.checkpoints import EMBEDDED
from pipeline.client import connection
from pipeline.client.client import ParsedPiece, PipelineClient
from pipeline.client.detokenizer import tokenizer_hash
from pipeline.process.flight_recorder import digest_of
from pipeline.process.liveness import LOCK
from pipeline.transport.ends import Received
from pipeline.transport.sockets import Sockets
from pipeline.wire.clients import (
    PROTOCOL_VERSION,
    AbortRequest,
    Accepted,
    Hello,
    Interrupted,
    Preparing,
    QueryRequest,
    RequestFailed,
    RequestOutput,
    SubmitRequest,
    TokenLogprobs,
    TokenOutputs,
    Welcome,
)
from pipeline.wire.control import PipelineState, WorkerState
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import FinishReason, Grammar, GrammarKind, SamplingParams
from pipeline.wire.topology import CONTROL, INGEST, OUTPUTS, Role, WorkerId
from tests.fakes import LLM_0, PREPROCESS
from tests.pipeline.parsers.reading import Read, together
from tests.tool_chats import BARE, HELLO, WEATHER, to_chat
from tools.random_checkpoint.tokenizer import chat_template
from workers.api.chat_request import ChatCompletionRequest
from workers.api.chat_submission import to_submission
from workers.api.endpoints.base import ServedModel
from workers.api.json_bodies import decode_json

LLM_1 = WorkerId(Role.LLM, 1)
CHAT = [ChatMessage("user", "Hello")]
GREEDY = SamplingParams(temperature=0)


class Pipeline:
    """Answers like one, as the test says."""

    def __init__(self, run_dir: Path) -> None:
        self.epochs = {LLM_0: 1, PREPROCESS: 1}
        self.sockets = Sockets(run_dir, self.epochs)
        self.control = self.sockets.publisher(CONTROL)
        self.outputs = self.sockets.publisher(OUTPUTS, lambda topic, _: len(topic) == 16)
        self.ingest = self.sockets.async_receiver(INGEST)
        self.limits: dict[str, Any] = {}
        self.leads = [0]
        self.down: set[WorkerId] = set()
        self.silent: dict[WorkerId, float] = {}
        self.client_id = b""
        self.protocol = PROTOCOL_VERSION
        self.max_requests = 4
        self.tokenizer = Tokenizer.from_file(str(EMBEDDED / "model" / "tokenizer.json"))

    async def welcome(self) -> None:
        """Plays the start: the state to the new subscriber, then Welcome once Hello and subscription are
        there."""
        while True:
            if any(event.is_new for event in self.control.subscriptions()):
                self.say_states()
            known = [event.topic for event in self.outputs.subscriptions()]
            self.client_id = known[0] if known else self.client_id
            try:
                received = await asyncio.wait_for(self.ingest.receive(), 0.02)
            except TimeoutError:
                continue
            if isinstance(received.message, Hello) and received.message.client_id == self.client_id:
                self.say(Welcome, **self.welcome_fields)
                return

    @property
    def welcome_fields(self) -> dict[str, Any]:
        folder = EMBEDDED / "model"
        return {
            "protocol": self.protocol, "model_folder": str(folder), "model_name": "m", "max_model_len": 100,
            "tokenizer_hash": tokenizer_hash((folder / "tokenizer.json").read_bytes()),
            "max_requests": self.max_requests, "max_request_bytes": 1000, **self.limits,
        }  # fmt: skip

    def say_states(self, **executed: tuple[bytes, ...]) -> None:
        """`executed`: by role, what the incarnation before was executing when it died."""
        states = tuple(
            WorkerState(
                worker, epoch, worker not in self.down, executed=executed.get(worker.role, ()),
                silent_s=self.silent.get(worker, 0.0),
            )
            for worker, epoch in self.epochs.items()
        )  # fmt: skip
        self.control.publish(PipelineState(workers=states, leads=tuple(self.leads)))

    def replace(self, worker: WorkerId, *executed: str) -> None:
        """A worker dies and its successor binds its edges; the launcher tells."""
        self.epochs[worker] += 1
        self.sockets.epochs.update(self.epochs)
        if worker == PREPROCESS:
            self.ingest.close()
            self.ingest = self.sockets.async_receiver(INGEST)
        else:
            self.outputs.close()
            self.client_id = b""  # until the client has subscribed anew
            self.outputs = self.sockets.publisher(OUTPUTS, lambda topic, _: len(topic) == 16)
        self.say_states(**{worker.role: tuple(map(digest_of, executed))})

    def say(self, kind: Callable[..., Any], **fields: Any) -> None:
        assert self.outputs.publish(kind(sender=LLM_0, epoch=self.epochs[LLM_0], **fields), self.client_id)

    def say_tokens(
        self,
        request: SubmitRequest,
        offset: int,
        tokens: Sequence[int],
        finish: FinishReason | None = None,
        index: int = 0,
    ) -> None:
        output = RequestOutput(
            request.request_id, request.attempt, offset, pack_int32(tokens), finish, index=index
        )
        self.say(TokenOutputs, outputs=(output,))

    async def next(self, kind: type) -> Received[Any]:
        while True:
            received = await asyncio.wait_for(self.ingest.receive(), 5)
            if isinstance(received.message, kind):
                return received


@pytest.fixture
async def pipeline(tmp_path: Path) -> AsyncIterator[Pipeline]:
    made = Pipeline(tmp_path)
    yield made
    made.sockets.close()


@pytest.fixture
async def client(pipeline: Pipeline, tmp_path: Path) -> AsyncIterator[PipelineClient]:
    made = PipelineClient(tmp_path)
    await asyncio.gather(made.start(), pipeline.welcome())
    yield made
    await made.close()


async def collect(
    client: PipelineClient,
    chat: Sequence[ChatMessage] = CHAT,
    sampling: SamplingParams = GREEDY,
    media: Sequence[bytes] = (),
) -> Any:
    pieces = [piece async for piece in client.generate(chat, sampling, media)]
    return "".join(piece.text for piece in pieces), pieces


async def test_text_comes_in_pieces_with_its_counts(client: PipelineClient, pipeline: Pipeline) -> None:
    ids = pipeline.tokenizer.encode("A red circle.", add_special_tokens=False).ids
    task = asyncio.create_task(collect(client))
    request = (await pipeline.next(SubmitRequest)).message
    assert request.sampling.seed is None, "the request's id gives it a seed, also when it is submitted again"
    pipeline.say(Accepted, request_id=request.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    for offset, token in enumerate(ids):
        pipeline.say_tokens(request, offset, [token], FinishReason.STOP if offset == len(ids) - 1 else None)
    text, pieces = await task
    assert text == "A red circle."
    assert (pieces[-1].num_prompt_tokens, pieces[-1].num_output_tokens, pieces[-1].finish_reason) == (
        9,
        len(ids),
        "stop",
    )
    assert client.num_open == 0


async def test_a_chats_calls_are_read(client: PipelineClient, pipeline: Pipeline) -> None:
    """As by the HTTP endpoint; tools and options travel with the chat."""
    text = 'So:\n<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'
    ids = pipeline.tokenizer.encode(text, add_special_tokens=False).ids
    chat = to_chat([HELLO], [BARE], template_options={"enable_thinking": False})

    async def read() -> list[ParsedPiece]:
        return [one async for one in client.chat(chat, GREEDY)]

    task = asyncio.create_task(read())
    request = (await pipeline.next(SubmitRequest)).message
    assert request.prompt == chat
    pipeline.say(Accepted, request_id=request.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    for offset, token in enumerate(ids):
        pipeline.say_tokens(request, offset, [token], FinishReason.STOP if offset == len(ids) - 1 else None)
    told = await task
    events = [event for one in told for event in one.events]
    assert together(events) == Read("So:", [("now", '{"zone": "é"}')])
    assert told[-1].piece.finish_reason is FinishReason.STOP
    assert client.forms is client.forms


@pytest.mark.parametrize("thinks", [True, False])
async def test_a_budget_of_thoughts_gets_the_tokens_that_end_one(
    thinks: bool, pipeline: Pipeline, tmp_path: Path
) -> None:
    """In chats in which the model thinks; the same tokens go with every attempt."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(chat_template("qwen3_5"))
    client = PipelineClient(tmp_path, model_folder=folder)
    await asyncio.gather(client.start(), pipeline.welcome())
    chat = to_chat([HELLO], template_options={"enable_thinking": thinks})
    sampling = SamplingParams(thinking_budget=5)
    task = asyncio.create_task(anext(client.chat(chat, sampling)))
    sent = (await pipeline.next(SubmitRequest)).message.sampling
    task.cancel()
    end = tuple(pipeline.tokenizer.encode("</think>", add_special_tokens=False).ids)
    assert (sent.thinking_budget, sent.thinking_end) == ((5, end) if thinks else (None, ()))
    await client.close()


async def test_a_gap_is_asked_for_and_overlap_is_dropped(client: PipelineClient, pipeline: Pipeline) -> None:
    ids = pipeline.tokenizer.encode("A blue star at the top left.", add_special_tokens=False).ids
    task = asyncio.create_task(
        collect(client, [ChatMessage("user", (ImagePart(frame=0),))], media=[b"bytes"])
    )
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say(Accepted, request_id=request.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    pipeline.say_tokens(request, 0, ids[:2])
    pipeline.say_tokens(request, 4, ids[4:5])  # tokens 2 and 3 got lost
    query = await pipeline.next(QueryRequest)
    assert (query.message.request_id, query.message.attempt, query.message.num_received) == (
        request.request_id,
        1,
        (2,),
    )
    assert query.frames == [], "what was accepted is not sent again"
    pipeline.say_tokens(request, 5, ids[5:6])
    pipeline.say_tokens(request, 1, ids[1:], FinishReason.LENGTH)  # the answer overlaps with what is there
    text, pieces = await task
    assert text == "A blue star at the top left."
    assert [token for piece in pieces for token in piece.token_ids] == ids
    assert client.counters["gaps"] >= 1


async def test_outputs_of_another_attempt_or_request_are_dropped_and_counted(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    task = asyncio.create_task(collect(client))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say(
        TokenOutputs, outputs=(RequestOutput(request.request_id, 0, 0, pack_int32([20]), FinishReason.STOP),)
    )
    pipeline.say(
        TokenOutputs, outputs=(RequestOutput("someone else", 1, 0, pack_int32([20]), FinishReason.STOP),)
    )
    pipeline.say_tokens(request, 0, [], FinishReason.STOP)
    assert (await task)[0] == ""
    assert client.counters["stale_outputs"] == 2


async def test_a_failure_is_raised_with_its_field_and_status(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    task = asyncio.create_task(collect(client))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say(
        RequestFailed,
        request_id=request.request_id,
        attempt=1,
        error=ErrorInfo(413, "too large", "messages[0]"),
    )
    with pytest.raises(RequestError, match="too large") as caught:
        await task
    assert (caught.value.info.status, caught.value.info.field) == (413, "messages[0]")


async def leave_early(client: PipelineClient, pipeline: Pipeline) -> SubmitRequest:
    """A request whose generator is left after the first token."""
    stream = client.generate(CHAT, GREEDY)
    task = asyncio.create_task(anext(stream))
    request: SubmitRequest = (await pipeline.next(SubmitRequest)).message
    pipeline.say_tokens(request, 0, [20])
    await task
    await stream.aclose()
    return request


async def test_leaving_early_aborts_until_it_is_answered(client: PipelineClient, pipeline: Pipeline) -> None:
    request = await leave_early(client, pipeline)
    first = (await pipeline.next(AbortRequest)).message
    second = (await pipeline.next(AbortRequest)).message
    assert first == second
    assert first.request_id == request.request_id
    pipeline.say_tokens(request, 1, [], FinishReason.ABORT)
    await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pipeline.ingest.receive(), 1.5)


async def test_a_stop_string_ends_the_request_upstream(client: PipelineClient, pipeline: Pipeline) -> None:
    ids = pipeline.tokenizer.encode("A red circle at the top", add_special_tokens=False).ids
    task = asyncio.create_task(collect(client, sampling=SamplingParams(stop=("circle",))))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say_tokens(request, 0, ids)
    text, pieces = await task
    assert (text, pieces[-1].finish_reason) == ("A red ", FinishReason.STOP)
    assert (await pipeline.next(AbortRequest)).message.request_id == request.request_id


async def test_each_token_of_a_step_is_a_piece(client: PipelineClient, pipeline: Pipeline) -> None:
    """A step may yield several tokens: a stop string ends the text, its counts and its logprobs where it
    would have ended them otherwise."""
    ids = pipeline.tokenizer.encode("A red circle at the top", add_special_tokens=False).ids
    entries = tuple(TokenLogprobs(pack_int32([token]), bytes(4)) for token in ids)
    for stop, finish in (
        ((), FinishReason.LENGTH),
        (("at",), FinishReason.STOP),
        (("top",), FinishReason.STOP),
    ):
        sampling = SamplingParams(stop=stop, logprobs=0)
        task = asyncio.create_task(collect(client, sampling=sampling))
        request = (await pipeline.next(SubmitRequest)).message
        for offset, end in ((0, 1), (1, len(ids))):
            output = RequestOutput(
                request.request_id, 1, offset, pack_int32(ids[offset:end]),
                FinishReason.LENGTH if end == len(ids) else None, entries[offset:end], 8,
            )  # fmt: skip
            pipeline.say(TokenOutputs, outputs=(output,))
        text, pieces = await task
        wanted = "A red circle at the top".partition(stop[0])[0] if stop else "A red circle at the top"
        assert text == wanted
        assert [piece.token_ids for piece in pieces] == [(token,) for token in ids[: len(pieces)]]
        assert [piece.num_output_tokens for piece in pieces] == [*range(1, len(pieces) + 1)]
        assert [piece.logprobs for piece in pieces] == [(entry,) for entry in entries[: len(pieces)]]
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [finish]
        assert (len(pieces) == len(ids)) == (stop != ("at",))
        assert client.num_open == 0


# Several choices.


async def test_choices_come_side_by_side_and_each_ends_by_itself(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    ids = [
        pipeline.tokenizer.encode(text, add_special_tokens=False).ids
        for text in ("A red circle at the top", "A blue star.")
    ]
    task = asyncio.create_task(collect(client, sampling=SamplingParams(n=2, stop=("circle",))))
    request = (await pipeline.next(SubmitRequest)).message
    assert request.sampling.n == 2
    pipeline.say_tokens(request, 0, ids[1][:2], index=1)
    pipeline.say_tokens(request, 0, ids[0])
    abort = (await pipeline.next(AbortRequest)).message
    assert (abort.request_id, abort.index) == (request.request_id, 0), "only the choice with the stop string"
    pipeline.say_tokens(request, len(ids[0]), [20])  # it had not heard of the abort yet
    pipeline.say_tokens(request, len(ids[0]) + 1, [], FinishReason.ABORT)
    pipeline.say_tokens(request, 2, ids[1][2:], FinishReason.LENGTH, index=1)
    _, pieces = await task
    texts = ["".join(piece.text for piece in pieces if piece.index == index) for index in range(2)]
    assert texts == ["A red ", "A blue star."]
    ends = {piece.index: piece.finish_reason for piece in pieces if piece.finish_reason is not None}
    assert ends == {0: FinishReason.STOP, 1: FinishReason.LENGTH}
    assert client.num_open == 0
    assert not client._connection.aborts


async def test_a_stop_string_in_what_was_not_read_when_the_request_was_given_up(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    ids = pipeline.tokenizer.encode("A red circle.", add_special_tokens=False).ids
    stream = client.generate(CHAT, SamplingParams(n=2, stop=("circle",)))
    first = asyncio.create_task(anext(stream))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say_tokens(request, 0, ids[:1])
    await first
    pipeline.say_tokens(request, 1, ids[1:])
    opened = client._connection._open[request.request_id]
    while opened.events.empty():
        await asyncio.sleep(0.01)
    pipeline.control.publish(PipelineState(workers=(), end="vit.0 was killed"))
    await asyncio.sleep(0.1)
    text = ""
    while (piece := await anext(stream)).finish_reason is None:
        text += piece.text
    assert "circle" not in text + piece.text
    with pytest.raises(RequestError, match=r"vit\.0 was killed"):
        await anext(stream)


async def test_what_a_caller_does_not_read_is_bounded(
    client: PipelineClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_UNREAD", 3)
    stream = client.generate(CHAT, GREEDY)
    first = asyncio.create_task(anext(stream))
    request = (await pipeline.next(SubmitRequest)).message
    for offset in range(6):
        pipeline.say_tokens(request, offset, [20])
    await first
    assert (await pipeline.next(AbortRequest)).message.request_id == request.request_id
    num_read = 0

    async def read_on() -> None:
        nonlocal num_read
        async for _ in stream:
            num_read += 1

    with pytest.raises(RequestError, match="not read as fast"):
        await read_on()
    assert num_read in (3, 4), "what came before is there; the first one may have been read meanwhile"


async def test_a_choice_that_is_over_is_not_asked_for_again(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    task = asyncio.create_task(collect(client, sampling=SamplingParams(n=3, temperature=0)))
    request = await accept(pipeline, task)
    pipeline.say_tokens(request, 0, [20, 21], FinishReason.LENGTH, index=1)
    pipeline.say_tokens(request, 0, [30], index=2)
    await asyncio.sleep(0.1)
    pipeline.replace(LLM_0, request.request_id)
    await pipeline.welcome()
    again = (await pipeline.next(SubmitRequest)).message
    assert [tokens_in(again, index) for index in range(3)] == [[], [20, 21], [30]]
    assert [choice.is_over for choice in again.choices] == [False, True, False]
    pipeline.say_tokens(again, 0, [40], FinishReason.STOP)
    pipeline.say_tokens(again, 1, [31], FinishReason.STOP, index=2)
    _, pieces = await task
    tokens = [[t for piece in pieces if piece.index == index for t in piece.token_ids] for index in range(3)]
    assert tokens == [[40], [20, 21], [30, 31]]


async def test_leaving_early_is_answered_by_the_abort_and_not_by_the_end_of_one_choice(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    stream = client.generate(CHAT, SamplingParams(n=2))
    first = asyncio.ensure_future(anext(stream))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say_tokens(request, 0, [20])
    await first
    await stream.aclose()
    assert (await pipeline.next(AbortRequest)).message.index is None
    pipeline.say_tokens(request, 1, [21], FinishReason.LENGTH)
    assert (await pipeline.next(AbortRequest)).message.index is None, "the other one may still run"
    pipeline.say_tokens(request, 0, [], FinishReason.ABORT, index=1)
    while client._connection.aborts:
        await asyncio.sleep(0.01)


async def test_data_urls_become_frames(client: PipelineClient, pipeline: Pipeline) -> None:
    parts = (
        TextPart("look"),
        ImagePart(url="data:image/png;base64,aGVsbG8="),
        ImagePart(url="http://x/y"),
        ImagePart(frame=0),
    )
    task = asyncio.create_task(collect(client, [ChatMessage("user", parts)], media=[b"mine"]))
    received = await pipeline.next(SubmitRequest)
    assert [bytes(frame) for frame in received.frames] == [b"mine", b"aGVsbG8="]
    content = received.message.prompt.messages[0].content
    assert content == (
        TextPart("look"),
        ImagePart(frame=1, is_base64=True),
        ImagePart(url="http://x/y"),
        ImagePart(frame=0),
    )
    pipeline.say_tokens(received.message, 0, [], FinishReason.STOP)
    await task


async def test_limits_are_kept_before_anything_is_sent(client: PipelineClient, pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="the limit is 1000") as caught:
        await collect(client, media=[bytes(1001)])
    assert caught.value.info.status == 413
    tasks = [asyncio.create_task(collect(client)) for _ in range(4)]
    await asyncio.sleep(0.05)
    with pytest.raises(RequestError) as caught:
        await collect(client)
    assert caught.value.info.status == 429
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_end_of_the_pipeline_ends_every_request_with_its_reason(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    tasks = [asyncio.create_task(collect(client)) for _ in range(2)]
    await asyncio.sleep(0.05)
    pipeline.control.publish(PipelineState(workers=(), end="vit.0 was killed by SIGKILL"))
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, RequestError)
        assert result.info.status == 503
        assert "vit.0 was killed by SIGKILL" in result.info.message
    with pytest.raises(RequestError, match=r"vit\.0"):
        await collect(client)


async def test_nothing_new_while_draining(client: PipelineClient, pipeline: Pipeline) -> None:
    pipeline.control.publish(PipelineState(workers=(), is_draining=True))
    await asyncio.sleep(0.1)
    with pytest.raises(RequestError) as caught:
        await collect(client)
    assert caught.value.info.status == 503


async def test_another_protocol_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.protocol = 99
    client = PipelineClient(tmp_path)
    with pytest.raises(PipelineError, match="protocol 99"):
        await asyncio.gather(client.start(), pipeline.welcome())
    await client.close()


async def test_no_pipeline_is_told_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no pipeline answered"):
        await PipelineClient(tmp_path).start(timeout_s=0.3)


async def test_what_cannot_be_sent_leaves_nothing_open(client: PipelineClient) -> None:
    with pytest.raises(RequestError, match="not valid Unicode") as caught:
        await collect(client, [ChatMessage("user", "\ud800")])
    assert caught.value.info.field == "messages"
    with pytest.raises(RequestError, match="does not fit 64 bits"):
        await collect(client, [ChatMessage("user", (ImagePart(url="data:,x", max_pixels=2**64),))])
    with pytest.raises(RequestError, match="1025 pictures and frames, the limit is 1024"):
        await collect(client, [ChatMessage("user", tuple(ImagePart(url="data:,x") for _ in range(1025)))])
    with pytest.raises(RequestError, match="the limit is 1000"):
        await collect(client, [ChatMessage("user", "x" * 2000)])
    assert client.num_open == 0


async def test_a_silent_request_is_asked_about_though_it_was_accepted(
    client: PipelineClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.client.connection.QUERY_AFTER_S", 0.5)
    task = asyncio.create_task(collect(client))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say(Accepted, request_id=request.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    pipeline.say_tokens(request, 0, [20])  # and then the terminal message gets lost
    for _ in range(2):  # and the first answer to the query, too
        assert isinstance((await pipeline.next(Hello)).message, Hello)
        assert (await pipeline.next(QueryRequest)).message.num_received == (1,)
    pipeline.say_tokens(request, 1, [], FinishReason.STOP)
    assert (await task)[1][-1].finish_reason == "stop"


async def test_a_pipeline_that_speaks_again_is_there_again(
    client: PipelineClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.client.connection.HEARTBEAT_TIMEOUT_S", 0.5)
    task = asyncio.create_task(collect(client))
    with pytest.raises(RequestError, match="no longer answers"):
        await asyncio.wait_for(task, 10)
    assert client.failure
    monkeypatch.setattr("pipeline.client.connection.HEARTBEAT_TIMEOUT_S", 60)
    pipeline.control.publish(PipelineState(workers=()))
    await asyncio.sleep(0.2)
    assert not client.failure


async def test_who_stood_still_takes_its_own_silence_for_nobody_elses(
    client: PipelineClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks about what it has open, since it may have been cut off."""
    monkeypatch.setattr("pipeline.client.connection.TICK_S", 0.2)
    monkeypatch.setattr("pipeline.client.connection.HEARTBEAT_TIMEOUT_S", 1.5)
    task = asyncio.create_task(collect(client))
    request = (await pipeline.next(SubmitRequest)).message
    await asyncio.sleep(1.1)  # the first tick was a second long still
    pipeline.say_states()
    await asyncio.sleep(0.05)
    time.sleep(2)  # noqa: ASYNC251  the whole loop
    query = (await pipeline.next(QueryRequest)).message
    assert (query.request_id, query.attempt) == (request.request_id, 1)
    assert not client.failure
    pipeline.say_tokens(request, 0, [], FinishReason.STOP)
    assert (await asyncio.wait_for(task, 5))[1][-1].finish_reason == "stop"


async def test_closing_ends_generators_that_wait(pipeline: Pipeline, tmp_path: Path) -> None:
    client = PipelineClient(tmp_path)
    await asyncio.gather(client.start(), pipeline.welcome())
    task = asyncio.create_task(collect(client))
    await pipeline.next(SubmitRequest)
    await client.close()
    with pytest.raises(RequestError, match="closed"):
        await asyncio.wait_for(task, 5)


async def test_an_interrupted_request_is_submitted_again_and_goes_on(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    ids = pipeline.tokenizer.encode("A red circle.", add_special_tokens=False).ids
    task = asyncio.create_task(
        collect(client, [ChatMessage("user", (ImagePart(frame=0),))], media=[b"picture"])
    )
    first = (await pipeline.next(SubmitRequest)).message
    pipeline.say(Accepted, request_id=first.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    pipeline.say_tokens(first, 0, ids[:2])
    pipeline.say(Interrupted, request_id=first.request_id, attempt=1, reason="preempted")
    received = await pipeline.next(SubmitRequest)
    again = received.message
    assert (again.request_id, again.attempt, again.sampling) == (first.request_id, 2, first.sampling)
    assert tokens_in(again) == ids[:2]
    assert [bytes(frame) for frame in received.frames] == [b"picture"]
    # said again: of an attempt that is over
    pipeline.say(Interrupted, request_id=first.request_id, attempt=1, reason="preempted")
    pipeline.say(Accepted, request_id=first.request_id, attempt=2, num_prompt_tokens=9, mm_hashes=())
    pipeline.say_tokens(again, 2, ids[2:], FinishReason.STOP)
    text, pieces = await task
    assert text == "A red circle."
    assert pieces[-1].num_output_tokens == len(ids)


async def test_logprobs_follow_their_tokens_over_a_repeated_answer(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    ids = pipeline.tokenizer.encode("A red circle.", add_special_tokens=False).ids
    entries = [TokenLogprobs(pack_int32([token]), bytes(4)) for token in ids]
    task = asyncio.create_task(collect(client, sampling=SamplingParams(logprobs=0)))
    request = (await pipeline.next(SubmitRequest)).message

    def say(offset: int, stop: int, finish: FinishReason | None) -> None:
        output = RequestOutput(
            request.request_id,
            1,
            offset,
            pack_int32(ids[offset:stop]),
            finish,
            tuple(entries[offset:stop]),
            8,
        )
        pipeline.say(TokenOutputs, outputs=(output,))

    say(0, 2, None)
    say(1, len(ids), FinishReason.STOP)
    _, pieces = await task
    assert [entry for piece in pieces for entry in piece.logprobs] == entries
    assert pieces[-1].num_cached_tokens == 8


async def test_priority_and_salt_travel(client: PipelineClient, pipeline: Pipeline) -> None:
    pieces = client.generate(CHAT, GREEDY, priority=-3, cache_salt=b"tenant")
    task = asyncio.ensure_future(anext(pieces))
    request = (await pipeline.next(SubmitRequest)).message
    assert (request.priority, request.cache_salt) == (-3, b"tenant")
    pipeline.say_tokens(request, 0, [5], FinishReason.STOP)
    await task


async def test_the_bytes_of_tokens_add_up_to_the_text(client: PipelineClient, pipeline: Pipeline) -> None:
    text = "A red circle \u2013 \u5706 \U0001f600\n"
    ids = pipeline.tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(client.token_text(token) for token in ids) == text.encode()
    end = pipeline.tokenizer.token_to_id("<|im_end|>")
    assert client.token_text(end) == b"<|im_end|>"
    assert client.token_text(10**6) == b""


async def test_another_picture_at_the_same_url_fails_the_request(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    task = asyncio.create_task(collect(client, [ChatMessage("user", (ImagePart(url="http://x/y.png"),))]))
    request = (await pipeline.next(SubmitRequest)).message
    pipeline.say(Accepted, request_id=request.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=(b"one",))
    pipeline.say_tokens(request, 0, [5, 6])
    pipeline.say(Interrupted, request_id=request.request_id, attempt=1, reason="preempted")
    await pipeline.next(SubmitRequest)
    pipeline.say(
        Accepted, request_id=request.request_id, attempt=2, num_prompt_tokens=9, mm_hashes=(b"other",)
    )
    with pytest.raises(RequestError, match="another picture"):
        await task
    assert (await pipeline.next(AbortRequest)).message.attempt == 2


async def test_an_interruption_settles_an_abort(client: PipelineClient, pipeline: Pipeline) -> None:
    request = await leave_early(client, pipeline)
    await pipeline.next(AbortRequest)
    pipeline.say(Interrupted, request_id=request.request_id, attempt=1, reason="preempted")
    while client._connection.aborts:
        await asyncio.sleep(0.01)
    assert client.num_open == 0


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1, 10**30])
async def test_a_priority_beyond_32_bits_is_refused(priority: int, client: PipelineClient) -> None:
    with pytest.raises(RequestError, match="32 bits"):
        await anext(client.generate(CHAT, GREEDY, priority=priority))


# Recovery.


def tokens_in(request: SubmitRequest, index: int = 0) -> list[int]:
    """Those of earlier attempts."""
    return unpack_int32(request.choices[index].output_token_ids).tolist() if request.choices else []


async def accept(pipeline: Pipeline, task: asyncio.Task[Any], num_tokens: int = 0) -> SubmitRequest:
    """Takes a request in and answers with its first tokens."""
    request: SubmitRequest = (await pipeline.next(SubmitRequest)).message
    pipeline.say(
        Accepted, request_id=request.request_id, attempt=request.attempt, num_prompt_tokens=9, mm_hashes=()
    )
    if num_tokens:
        first = len(tokens_in(request))
        pipeline.say_tokens(request, first, list(range(20 + first, 20 + first + num_tokens)))
    await asyncio.sleep(0.1)
    assert not task.done()
    return request


async def test_what_no_llm_accepted_is_submitted_again_when_preprocess_dies(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    tasks = [asyncio.create_task(collect(client)) for _ in range(2)]
    accepted = await accept(pipeline, tasks[0], 2)
    lost = (await pipeline.next(SubmitRequest)).message
    pipeline.replace(PREPROCESS)
    again = (await pipeline.next(SubmitRequest)).message
    assert (again.request_id, again.attempt) == (lost.request_id, 2)
    pipeline.say_tokens(again, 0, [20], FinishReason.STOP)
    pipeline.say_tokens(accepted, 2, [22], FinishReason.STOP)
    results = await asyncio.gather(*tasks)
    assert [pieces[-1].num_output_tokens for _, pieces in results] == [3, 1]


async def test_what_has_ended_is_not_submitted_again_though_nobody_took_its_end(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    stream = client.generate(CHAT, GREEDY)
    first = asyncio.ensure_future(anext(stream))
    request = await accept(pipeline, asyncio.current_task())  # type: ignore[arg-type]
    pipeline.say_tokens(request, 0, [50])
    await first
    pipeline.say_tokens(request, 1, [51], FinishReason.LENGTH)
    opened = client._connection._open[request.request_id]
    while not opened.is_over:
        await asyncio.sleep(0.01)
    pipeline.replace(LLM_0, request.request_id)
    await pipeline.welcome()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pipeline.next(SubmitRequest), 0.3)  # Hello may come twice
    assert [piece.finish_reason async for piece in stream][-1] == FinishReason.LENGTH
    assert client._connection.counters["resubmitted"] == 0


async def test_hello_comes_before_what_is_submitted_again(client: PipelineClient, pipeline: Pipeline) -> None:
    """The LLM may have taken it that we had left."""
    task = asyncio.create_task(collect(client))
    request = await accept(pipeline, task)
    pipeline.say(
        Interrupted, request_id=request.request_id, attempt=1, reason="its client has to say hello again"
    )
    assert isinstance((await asyncio.wait_for(pipeline.ingest.receive(), 5)).message, Hello)
    again = (await pipeline.next(SubmitRequest)).message
    pipeline.say_tokens(again, 0, [50], FinishReason.STOP)
    await task


async def test_a_long_request_id_is_refused(client: PipelineClient) -> None:
    with pytest.raises(RequestError, match="256 characters"):
        await anext(client.generate(CHAT, GREEDY, request_id="x" * 257))


async def test_a_successor_of_the_llm_is_greeted_before_anything_is_submitted_again(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    tasks = [asyncio.create_task(collect(client)) for _ in range(2)]
    first = await accept(pipeline, tasks[0], 2)
    await pipeline.next(SubmitRequest)
    pipeline.replace(LLM_0)
    assert isinstance((await asyncio.wait_for(pipeline.ingest.receive(), 5)).message, Hello)
    new = asyncio.create_task(collect(client))  # one that comes meanwhile waits, too
    await asyncio.sleep(0.1)
    await pipeline.welcome()
    again = {
        message.request_id: message
        for message in [(await pipeline.next(SubmitRequest)).message for _ in range(3)]
    }
    assert sorted(message.attempt for message in again.values()) == [1, 2, 2]
    assert tokens_in(again[first.request_id]) == [20, 21]
    assert again[first.request_id].lead == 0
    for message in again.values():
        pipeline.say_tokens(message, len(tokens_in(message)), [22], FinishReason.STOP)
    pieces = (await asyncio.gather(*tasks, new))[0][1]
    assert [token for piece in pieces for token in piece.token_ids] == [20, 21, 22]


async def test_a_request_that_workers_die_of_is_given_up(client: PipelineClient, pipeline: Pipeline) -> None:
    task = asyncio.create_task(collect(client))
    request = await accept(pipeline, task)
    for attempt in (2, 3):
        pipeline.replace(LLM_0, request.request_id)
        await pipeline.welcome()
        request = await accept(pipeline, task)
        assert request.attempt == attempt
    pipeline.replace(LLM_0, request.request_id)
    with pytest.raises(
        RequestError, match=r"given up: llm\.0 died while it was executing there, 3 times in a row"
    ) as caught:
        await task
    assert caught.value.info.status == 503
    assert (await pipeline.next(AbortRequest)).message.attempt == 3


async def test_who_had_bad_neighbours_in_every_stage_is_not_given_up(
    client: PipelineClient, pipeline: Pipeline
) -> None:
    task = asyncio.create_task(collect(client))
    request = await accept(pipeline, task)
    for died in (Role.VIT, Role.PREPROCESS, Role.VIT, Role.LLM):
        pipeline.say(
            Interrupted, request_id=request.request_id, attempt=request.attempt, reason="it died", died=died
        )
        request = await accept(pipeline, task)
    assert request.attempt == 5
    pipeline.say(
        Interrupted,
        request_id=request.request_id,
        attempt=request.attempt,
        reason="vit.0 died",
        died=Role.VIT,
    )
    with pytest.raises(
        RequestError, match=r"given up: vit\.0 died while it was executing there, 3 times in a row"
    ):
        await task


async def test_only_deaths_without_a_new_token_count(client: PipelineClient, pipeline: Pipeline) -> None:
    task = asyncio.create_task(collect(client))
    request = await accept(pipeline, task, 1)
    for attempt in range(2, 7):
        if attempt % 2:
            pipeline.say(
                Interrupted,
                request_id=request.request_id,
                attempt=request.attempt,
                reason="vit.0 died",
                died=Role.VIT,
            )
        else:
            pipeline.replace(LLM_0, request.request_id)
            await pipeline.welcome()
        request = await accept(pipeline, task, 1)
        assert request.attempt == attempt
    pipeline.say_tokens(request, 6, [26], FinishReason.STOP)
    assert (await task)[1][-1].num_output_tokens == 7


async def test_a_request_waits_for_successors_only_so_long(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.limits = {"recovery_timeout": 1.0}
    client = PipelineClient(tmp_path)
    await asyncio.gather(client.start(), pipeline.welcome())
    task = asyncio.create_task(collect(client))
    await accept(pipeline, task, 1)
    pipeline.replace(LLM_0)
    with pytest.raises(RequestError, match="did not recover within 1 s") as caught:
        await asyncio.wait_for(task, 5)
    assert caught.value.info.status == 503
    await client.close()


async def test_queries_and_aborts_name_the_group_that_runs_the_request(
    client: PipelineClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.client.connection.QUERY_AFTER_S", 0.5)
    task = asyncio.create_task(collect(client))
    await accept(pipeline, task)
    query = (await pipeline.next(QueryRequest)).message
    assert (query.attempt, query.lead) == (1, 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await pipeline.next(AbortRequest)).message.lead == 0


# Nothing waits without end.


@pytest.fixture
async def impatient(pipeline: Pipeline, tmp_path: Path) -> AsyncIterator[PipelineClient]:
    """A client that waits for three seconds."""
    pipeline.limits = {"recovery_timeout": 3.0}
    made = PipelineClient(tmp_path)
    await asyncio.gather(made.start(), pipeline.welcome())
    yield made
    await made.close()


async def test_what_nobody_takes_in_ends(impatient: PipelineClient, pipeline: Pipeline) -> None:
    """Its submission got lost, or nobody can be reached any more."""
    start = time.monotonic()
    task = asyncio.create_task(collect(impatient))
    while not task.done():
        pipeline.say_states()
        await asyncio.sleep(0.2)
    with pytest.raises(RequestError, match="did not answer within 3 s") as caught:
        await task
    assert caught.value.info.status == 503
    assert 3 <= time.monotonic() - start < 7
    assert impatient.num_open == 0
    assert (await pipeline.next(SubmitRequest)).message.attempt == 1
    assert (await pipeline.next(QueryRequest)).message.attempt == 1, "it was asked about before"


async def test_what_is_being_prepared_is_waited_for(impatient: PipelineClient, pipeline: Pipeline) -> None:
    """A download that takes longer than a recovery may: preprocess answers that it has the request."""
    task = asyncio.create_task(collect(impatient))
    end = time.monotonic() + 5
    while time.monotonic() < end:
        pipeline.say_states()
        with contextlib.suppress(TimeoutError):
            received = await asyncio.wait_for(pipeline.ingest.receive(), 0.2)
            if isinstance(received.message, SubmitRequest | QueryRequest):
                request = received.message
                fields = {"client_id": pipeline.client_id, "request_id": request.request_id}
                pipeline.say(Preparing, attempt=request.attempt, **fields)
        assert not task.done()
    pipeline.say(Accepted, request_id=request.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    pipeline.say_tokens(request, 0, [20], FinishReason.STOP)
    assert (await task)[1][-1].finish_reason == "stop"


async def test_behind_a_long_step_a_request_waits(impatient: PipelineClient, pipeline: Pipeline) -> None:
    """An LLM in a step of a minute answers nobody; the launcher sees that it moves on."""
    task = asyncio.create_task(collect(impatient))
    request = (await pipeline.next(SubmitRequest)).message
    end = time.monotonic() + 4.5
    while time.monotonic() < end:
        pipeline.silent = {LLM_0: 60.0 - (end - time.monotonic())}
        pipeline.say_states()
        await asyncio.sleep(0.2)
        assert not task.done()
    pipeline.silent = {}
    pipeline.say_tokens(request, 0, [20], FinishReason.STOP)
    assert (await task)[1][-1].finish_reason == "stop"


# A launcher that is silent.


async def test_a_launcher_that_is_frozen_ends_nothing(
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It holds its lock; the LLM goes on and answers."""
    monkeypatch.setattr("pipeline.client.connection.HEARTBEAT_TIMEOUT_S", 0.5)
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = PipelineClient(tmp_path)
        await asyncio.gather(client.start(), pipeline.welcome())
        task = asyncio.create_task(collect(client))
        request = await accept(pipeline, task, 1)
        await asyncio.sleep(2)
        assert not client.failure
        assert not task.done()
        new = asyncio.create_task(collect(client))
        other = (await pipeline.next(SubmitRequest)).message
        for message, offset in ((request, 1), (other, 0)):
            pipeline.say_tokens(message, offset, [21], FinishReason.STOP)
        assert [pieces[-1].finish_reason for _, pieces in await asyncio.gather(task, new)] == ["stop"] * 2
        late = asyncio.create_task(collect(client))
        fcntl.flock(lock, fcntl.LOCK_UN)  # and now it has died
        with pytest.raises(RequestError, match="no longer answers"):
            await asyncio.wait_for(late, 5)
        await client.close()


async def test_what_ends_while_the_launcher_is_frozen_is_not_waited_for_without_end(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is there to tell of the LLM's death."""
    monkeypatch.setattr("pipeline.client.connection.HEARTBEAT_TIMEOUT_S", 0.5)
    monkeypatch.setattr("pipeline.client.connection.QUERY_AFTER_S", 1.0)
    pipeline.limits = {"recovery_timeout": 3.0}
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = PipelineClient(tmp_path)
        await asyncio.gather(client.start(), pipeline.welcome())
        task = asyncio.create_task(collect(client))
        await accept(pipeline, task, 1)
        with pytest.raises(RequestError, match="did not answer within 3 s"):
            await asyncio.wait_for(task, 10)
        await client.close()


# Groups.


class Groups(Pipeline):
    """Two of them, led by ranks 0 and 1."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.leads = [0, 1]
        self.epochs[LLM_1] = self.sockets.epochs[LLM_1] = 1
        self.second = self.sockets.publisher(OUTPUTS, lambda topic, _: len(topic) == 16, rank=1)

    def greet(self, lead: int) -> None:
        worker, publisher = ((LLM_0, self.outputs), (LLM_1, self.second))[lead]
        welcome = Welcome(sender=worker, epoch=self.epochs[worker], **self.welcome_fields)
        assert publisher.publish(welcome, self.client_id)

    def say_second(self, kind: Callable[..., Any], **fields: Any) -> None:
        assert self.second.publish(kind(sender=LLM_1, epoch=self.epochs[LLM_1], **fields), self.client_id)

    async def welcome_from_both(self, client: PipelineClient) -> None:
        await self.welcome()
        while not self.second.subscriptions():
            await asyncio.sleep(0.02)
        self.greet(1)
        while client._connection.groups.known.keys() != {0, 1}:
            await asyncio.sleep(0.02)

    def kill_second(self) -> None:
        """Dead and reaped; its successor loads for long."""
        self.epochs[LLM_1] += 1
        self.sockets.epochs.update(self.epochs)
        self.second.close()
        self.second = self.sockets.publisher(OUTPUTS, lambda topic, _: len(topic) == 16, rank=1)
        self.down = {LLM_1}
        self.say_states()


@pytest.fixture
async def groups(tmp_path: Path) -> AsyncIterator[Groups]:
    made = Groups(tmp_path)
    yield made
    made.sockets.close()


@pytest.fixture
async def grouped(groups: Groups, tmp_path: Path) -> AsyncIterator[PipelineClient]:
    made = PipelineClient(tmp_path)
    await asyncio.gather(made.start(), groups.welcome_from_both(made))
    yield made
    await made.close()


async def test_a_dead_group_holds_up_nobody_elses_requests(grouped: PipelineClient, groups: Groups) -> None:
    tasks = [asyncio.create_task(collect(grouped)) for _ in range(2)]
    first, second = [(await groups.next(SubmitRequest)).message for _ in range(2)]
    assert first.leads == second.leads == (0, 1)
    groups.say(Accepted, request_id=first.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    groups.say_second(Accepted, request_id=second.request_id, attempt=1, num_prompt_tokens=9, mm_hashes=())
    await asyncio.sleep(0.1)
    groups.kill_second()
    start = time.monotonic()
    again = (await groups.next(SubmitRequest)).message
    assert (again.request_id, again.attempt) == (second.request_id, 2)
    assert (again.leads, again.lead) == ((0,), None), "only to the group that lives"
    tasks.append(asyncio.create_task(collect(grouped)))
    new = (await groups.next(SubmitRequest)).message
    assert (new.attempt, new.leads) == (1, (0,))
    assert time.monotonic() - start < 1
    for message in (first, again, new):
        groups.say_tokens(message, 0, [20], FinishReason.STOP)
    assert [pieces[-1].finish_reason for _, pieces in await asyncio.gather(*tasks)] == ["stop"] * 3
    assert grouped.counters["resubmitted"] == 1


async def test_a_group_that_is_back_is_used_once_it_knows_us(grouped: PipelineClient, groups: Groups) -> None:
    groups.kill_second()
    await asyncio.sleep(0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(groups.ingest.receive(), 0.5)  # nobody is greeted who does not serve
    groups.down = set()
    groups.say_states()
    assert isinstance((await groups.next(Hello)).message, Hello)
    tasks = [asyncio.create_task(collect(grouped))]
    assert (await groups.next(SubmitRequest)).message.leads == (0,)
    while not groups.second.subscriptions():
        await asyncio.sleep(0.02)
    groups.greet(1)
    while grouped._connection.groups.known.keys() != {0, 1}:
        await asyncio.sleep(0.02)
    tasks.append(asyncio.create_task(collect(grouped)))
    assert (await groups.next(SubmitRequest)).message.leads == (0, 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_client_starts_while_a_group_is_down(groups: Groups, tmp_path: Path) -> None:
    groups.down = {LLM_1}
    client = PipelineClient(tmp_path)
    await asyncio.gather(client.start(5), groups.welcome())
    task = asyncio.create_task(collect(client))
    request = (await groups.next(SubmitRequest)).message
    assert request.leads == (0,)
    groups.say_tokens(request, 0, [20], FinishReason.STOP)
    await task
    await client.close()


async def test_with_every_group_down_requests_wait_and_then_end(groups: Groups, tmp_path: Path) -> None:
    groups.limits = {"recovery_timeout": 1.0}
    client = PipelineClient(tmp_path)
    await asyncio.gather(client.start(), groups.welcome_from_both(client))
    groups.down = {LLM_0, LLM_1}
    groups.say_states()
    await asyncio.sleep(0.1)
    with pytest.raises(RequestError, match="did not recover within 1 s"):
        await asyncio.wait_for(collect(client), 5)
    await client.close()


@pytest.mark.parametrize(
    ("choice", "grammar", "shown", "begins"),
    [
        ("auto", None, ["weather", "now"], None),
        ("none", None, [], None),
        ("required", None, ["weather", "now"], '{"type": "tags_with_separator"'),
        ({"type": "function", "function": {"name": "now"}}, None, ["now"], '{"type": "tag", "begin": "<tool'),
        ("auto", Grammar(GrammarKind.JSON_OBJECT), ["weather", "now"], '{"type": "or", "elements"'),
    ],
)
async def test_a_choice_of_functions_means_what_it_means_over_http(
    pipeline: Pipeline, tmp_path: Path, choice: Any, grammar: Any, shown: Any, begins: str | None
) -> None:
    """What travels is what the HTTP endpoint would have sent."""
    pipeline.limits = {"max_request_bytes": 10_000}
    client = PipelineClient(tmp_path)
    await asyncio.gather(client.start(), pipeline.welcome())
    sampling = msgspec.structs.replace(GREEDY, grammar=grammar)
    chat = to_chat([HELLO], [WEATHER, BARE])
    task = asyncio.create_task(anext(client.chat(chat, sampling, tool_choice=choice)))
    sent = (await pipeline.next(SubmitRequest)).message
    task.cancel()
    body = {"messages": [HELLO], "tools": [WEATHER, BARE], "tool_choice": choice}
    if grammar is not None:
        body["response_format"] = {"type": "json_object"}
    request = decode_json(msgspec.json.encode(body), ChatCompletionRequest)
    served = ServedModel(("m",), cast(Any, SimpleNamespace(default_sampling={})), 0, client.forms)
    over_http = to_submission(request, served, "r")
    assert sent.prompt == over_http.prompt
    assert sent.sampling.grammar == over_http.sampling.grammar
    assert [tool["function"]["name"] for tool in msgspec.json.decode(sent.prompt.tools or b"[]")] == shown
    source = sent.sampling.grammar and sent.sampling.grammar.source
    start = '{"type": "structural_tag", "format": '
    assert source is None if begins is None else source.startswith(start + begins)
    await client.close()


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ([BARE], {"type": "function", "function": {"name": "other"}}, "tool_choice"),
        ([], "required", "tool_choice"),
        ([BARE], "perhaps", "tool_choice"),
        ([{"type": "function"}], None, "tools[0]"),
    ],
)
async def test_a_choice_of_no_function_is_refused_before_anything_is_sent(
    client: PipelineClient, tools: Any, choice: Any, field: str
) -> None:
    with pytest.raises(RequestError) as error:
        await anext(client.chat(to_chat([HELLO], tools), GREEDY, tool_choice=choice))
    assert error.value.info.field == field
    assert client.num_open == 0
