"""The client library: submits requests straight to the pipeline over ZeroMQ and yields text. The HTTP
endpoint uses it too.

    async with PipelineClient(run_dir) as client:
        async for piece in client.generate([ChatMessage("user", "Hello")], SamplingParams()):
            print(piece.text, end="")

A pipeline on another machine: `PipelineClient("tcp://HOST:PORT", keys=FOLDER)`, with the keys that
`tools/keys.py` has made.

Tokens come over a `Connection`, which resubmits interrupted requests; here they become text.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
from tokenizers import Tokenizer

from pipeline.client.connection import Connection
from pipeline.client.data_urls import move_data_urls, move_media_urls
from pipeline.client.detokenizer import Detokenizer, StopStrings, token_bytes, tokenizer_hash
from pipeline.client.open_request import OpenRequest
from pipeline.client.tags import special_tags
from pipeline.parsers.base import ParserEvent, ThoughtStart
from pipeline.parsers.forms import ChatForms
from pipeline.parsers.registry import AUTO, check_names
from pipeline.parsers.tool_choice import read_tools, to_chat_grammar, to_tool_choice
from pipeline.transport.cluster import Cluster
from pipeline.transport.keys import ClientKeys
from pipeline.transport.tcp import RemotePipeline
from pipeline.wire.clients import (
    MediaTokens,
    PromptLogprobs,
    RequestOutput,
    SubmitRequest,
    TokenLogprobs,
    Welcome,
)
from pipeline.wire.control import ReloadState, WorkerState
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from pipeline.wire.limits import MAX_ITEMS
from pipeline.wire.packing import unpack_ids
from pipeline.wire.prompts import Chat, ChatMessage, Prompt, Text, Tokens
from pipeline.wire.sampling import FinishReason, SamplingParams
from pipeline.wire.trace_context import TraceContext

OnInterrupted = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of one choice of a request, or none. The last piece of a choice has a finish reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int  # up to and including this piece
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if requested
    index: int = 0  # of the choice
    prompt_token_ids: tuple[int, ...] = ()  # of the first piece of a choice, if requested
    prompt_logprobs: PromptLogprobs | None = None  # of one piece, if requested
    stop_reason: str | int | None = None  # of the last piece: the stop string, or the one of `stop_token_ids`
    media: MediaTokens | None = None  # of the prompt's pictures and videos, if it has any


class ParsedPiece(NamedTuple):
    piece: Piece
    events: Sequence[ParserEvent]


class _ChoiceText:
    """Detokenizes one choice."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, kept: Mapping[int, str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, sampling.skip_special_tokens, kept)
        self._stop_strings = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._stop_token_ids, self._min_tokens = sampling.stop_token_ids, sampling.min_tokens
        self.is_over = False

    def add(self, output: RequestOutput, opened: OpenRequest) -> Piece:
        token_ids = tuple(unpack_ids(output.new_token_ids))
        finish = output.finish_reason
        # The first `min_tokens` tokens take no part in a stop string.
        num_early = max(0, self._min_tokens - output.offset)
        text = self._detokenizer.add(token_ids[:num_early]) if num_early else ""
        text += self._stop_strings.add(
            self._detokenizer.add(token_ids[num_early:], finish is not None), finish is not None
        )
        stop_reason: str | int | None = self._stop_strings.hit
        if stop_reason is not None:
            finish = FinishReason.STOP
        elif finish is FinishReason.STOP and token_ids and token_ids[-1] in self._stop_token_ids:
            stop_reason = token_ids[-1]
        self.is_over = finish is not None
        return Piece(
            text,
            token_ids,
            finish,
            opened.num_prompt_tokens,
            output.offset + len(token_ids),
            output.num_cached_tokens,
            output.logprobs,
            output.index,
            () if output.offset else opened.prompt_token_ids,
            output.prompt_logprobs,
            stop_reason,
            output.media,
        )


class PipelineClient:
    """One client of a pipeline; any number of requests at once.

    Use it as an asynchronous context manager, or `start` and `close`.
    """

    def __init__(
        self, place: str | Path, keys: str | Path | None = None, model_folder: str | Path | None = None,
        tool_call_parser: str = AUTO, reasoning_parser: str = AUTO, cluster: Cluster | None = None,
    ) -> None:  # fmt: skip
        """`place`: the pipeline's run directory, or tcp://HOST:PORT of its gateway. `keys`: a folder, needed
        for a gateway. `model_folder`: a folder with the files of tokenizer and chat template, if they are not
        at the server's path. The parsers are for `chat`: see docs/tools.md. `cluster`: for a worker of the
        pipeline, which reaches other nodes. Raises ValueError for an invalid
        place or invalid keys, and for an unknown parser.
        """
        check_names(tool_call_parser, reasoning_parser)
        if str(place).startswith("tcp://"):
            if keys is None:
                raise ValueError(f"{place} takes keys: a folder that tools/keys.py has made for this client")
            self._connection = Connection(RemotePipeline(str(place), ClientKeys.read(Path(keys))))
        else:
            self._connection = Connection(Path(place), cluster)
        self._model_folder = None if model_folder is None else Path(model_folder)
        self._tokenizer: Tokenizer | None = None
        self._tags: Mapping[int, str] = {}  # special tokens that are tags of calls and thoughts
        self._parsers = tool_call_parser, reasoning_parser
        self._forms: ChatForms | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, timeout_s: float = 60.0) -> Welcome:
        """Waits until the pipeline answers.

        Raises PipelineError if it does not within `timeout_s`, ends meanwhile, or has another tokenizer.
        """
        welcome = await self._connection.start(timeout_s)
        try:
            self._tokenizer = _read_tokenizer(self.model_folder / "tokenizer.json", welcome.tokenizer_hash)
            self._tags = special_tags(self._tokenizer)
        except PipelineError:
            await self.close()
            raise
        return welcome

    async def close(self) -> None:
        """Aborts the open requests and leaves; generators that still wait raise RequestError."""
        await self._connection.close()

    @property
    def welcome(self) -> Welcome:
        """The pipeline's limits and model; to be read after `start`."""
        return self._connection.limits

    @property
    def model_folder(self) -> Path:
        """A folder with the files of the pipeline's model, perhaps without its weights."""
        return self._model_folder or Path(self.welcome.model_folder)

    @property
    def num_open(self) -> int:
        return self._connection.num_open

    @property
    def is_draining(self) -> bool:
        return self._connection.is_draining

    @property
    def failure(self) -> str:
        """Why the pipeline is gone; empty while it is there."""
        return self._connection.end.message if self._connection.end else ""

    @property
    def leads(self) -> tuple[int, ...]:
        """The LLM ranks that lead a group; none before the connection is made."""
        return self._connection.groups.leads

    @property
    def workers(self) -> tuple[WorkerState, ...]:
        """All workers, by the launcher's last message."""
        return self._connection.workers

    @property
    def reload(self) -> ReloadState:
        return self._connection.reload

    @property
    def counters(self) -> dict[str, int]:
        return self._connection.counters

    async def generate(
        self, prompt: Sequence[ChatMessage] | Prompt, sampling: SamplingParams,
        media: Sequence[bytes | memoryview] = (), request_id: str = "",
        priority: int = 0, cache_salt: bytes = b"", tenant: str = "",
        trace_context: TraceContext | None = None, on_interrupted: OnInterrupted | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[Piece, None]:  # fmt: skip
        """Runs one prompt and yields its pieces. The last piece of each choice has a finish reason.

        `prompt`: the messages of a chat, or a `Text` or `Tokens` without a template. `ImagePart(frame=i)` or
        `VideoPart(frame=i)` in a message, or in the media of `Tokens`, names `media[i]`. A lower `priority`
        goes first. Only requests with an equal `cache_salt` share cached prefixes, so that no request's
        timing reveals the prompt of a request with another salt. `tenant`: the user, where one client submits
        for many; a gateway replaces it by the key's owner. `trace_context`: the place in the caller's trace
        (W3C Trace Context), in which the pipeline's spans are then. `on_interrupted` is called with the
        attempt and the reason where a worker's death ends one; the next attempt follows. `adapter`: one of
        those that `welcome` names. Leaving the generator early aborts the request.
        Raises RequestError when the request is refused or fails.
        """
        request = request_id or f"req-{uuid.uuid4().hex}"
        opened = self._submit(
            prompt, sampling, list(media), request, priority, cache_salt, tenant, trace_context, adapter
        )
        opened.on_interrupted = on_interrupted
        assert self._tokenizer is not None
        kept = {} if isinstance(prompt, Text | Tokens) else self._tags
        choices = [_ChoiceText(self._tokenizer, sampling, kept) for _ in range(sampling.n)]
        num_open = len(choices)
        try:
            while num_open:
                event = await opened.events.get()
                if isinstance(event, ErrorInfo):
                    self._connection.finish(request)
                    raise RequestError.from_info(event)
                choice = choices[event.index]
                if choice.is_over:  # a stop string ended it here; the LLM had already sampled more
                    continue
                for output in _token_by_token(event):
                    piece = choice.add(output, opened)
                    if choice.is_over:
                        num_open -= 1
                        if event.finish_reason is not None:
                            if not num_open:
                                self._connection.finish(request)
                        elif num_open:
                            self._connection.abort_choice(request, event.index)
                    yield piece
                    if choice.is_over:
                        break
        finally:
            if self._connection.is_open(request):
                self._connection.abort(request)

    async def chat(
        self, prompt: Chat, sampling: SamplingParams, media: Sequence[bytes | memoryview] = (),
        request_id: str = "", priority: int = 0, cache_salt: bytes = b"", tenant: str = "",
        trace_context: TraceContext | None = None, on_interrupted: OnInterrupted | None = None,
        tool_choice: str | Mapping[str, Any] | None = None, parallel_tool_calls: bool = True,
        adapter: str = "",
    ) -> AsyncGenerator[ParsedPiece, None]:  # fmt: skip
        """As `generate`, with what each piece says: content, thoughts, and calls of the chat's functions.

        `tool_choice` and `parallel_tool_calls` mean what they mean over HTTP (docs/tools.md): auto, none,
        required, or the object that names a function. The sampling's grammar is the form of the answer: it
        begins behind the thought, where the model thinks, and a call may come instead.
        """
        choice = to_tool_choice(read_tools(prompt.tools), tool_choice, parallel_tool_calls)
        chat = msgspec.structs.replace(prompt, tools=choice.data)
        grammar = to_chat_grammar(choice, chat, self.forms, sampling.grammar)
        sampling = msgspec.structs.replace(sampling, grammar=grammar)
        make_parser = self.forms.parser_maker(chat)
        parsers = [make_parser() for _ in range(sampling.n)]
        pieces = self.generate(
            chat, sampling, media, request_id, priority, cache_salt, tenant, trace_context, on_interrupted,
            adapter,
        )  # fmt: skip
        async with aclosing(pieces):
            async for piece in pieces:
                parser = parsers[piece.index]
                events = list(parser.add(piece.text))
                if piece.finish_reason is not None:
                    events += parser.finish()
                yield ParsedPiece(piece, events)

    def _with_thinking_end(self, sampling: SamplingParams, chat: Chat) -> SamplingParams:
        """A budget of thoughts needs the tokens that end one. Where the model does not think, there is no
        budget."""
        if sampling.thinking_budget is None or sampling.thinking_end:
            return sampling
        thoughts, start = self.forms.thoughts, self.forms.start(chat)
        if thoughts is None or start not in (ThoughtStart.THOUGHT, ThoughtStart.EXPECTED):
            return msgspec.structs.replace(sampling, thinking_budget=None)
        assert self._tokenizer is not None
        end = self._tokenizer.encode(thoughts.end, add_special_tokens=False).ids
        return msgspec.structs.replace(sampling, thinking_end=tuple(end))

    @property
    def forms(self) -> ChatForms:
        """How the model writes in a chat, by its template; to be read after `start`."""
        if self._forms is None:
            self._forms = ChatForms.read(self.model_folder, *self._parsers)
        return self._forms

    def token_text(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        assert self._tokenizer is not None
        return token_bytes(self._tokenizer, token_id)

    def _submit(
        self, prompt: Sequence[ChatMessage] | Prompt, sampling: SamplingParams,
        frames: list[bytes | memoryview],
        request_id: str,
        priority: int, cache_salt: bytes, tenant: str, trace_context: TraceContext | None, adapter: str,
    ) -> OpenRequest:  # fmt: skip
        if not -(2**31) <= priority < 2**31:
            raise RequestError(f"priority must fit 32 bits, got {priority}", field="priority")
        if not isinstance(prompt, Text | Tokens):
            chat = prompt if isinstance(prompt, Chat) else Chat(tuple(prompt))
            prompt = msgspec.structs.replace(chat, messages=move_data_urls(chat.messages, frames))
            sampling = self._with_thinking_end(sampling, prompt)
        elif isinstance(prompt, Tokens):
            prompt = msgspec.structs.replace(prompt, media=move_media_urls(prompt.media, frames))
        elif frames:
            what = "pictures and videos come in a chat, or with a prompt of tokens"
            raise RequestError(what, field="prompt")
        if len(frames) > MAX_ITEMS:
            raise RequestError(
                f"the request has {len(frames)} pictures and frames, the limit is {MAX_ITEMS}",
                field="messages",
            )
        if sampling.truncate_prompt_tokens is not None:  # the pipeline may have less room than the model
            kept = sampling.num_kept_of_prompt(self.welcome.max_model_len)
            sampling = msgspec.structs.replace(sampling, truncate_prompt_tokens=kept)
        request = SubmitRequest(
            client_id=self._connection.client_id, request_id=request_id, attempt=1, prompt=prompt,
            sampling=sampling, priority=priority,
            cache_salt=cache_salt, tenant=tenant, adapter=adapter,
            trace=msgspec.UNSET if trace_context is None else trace_context,
        )  # fmt: skip
        return self._connection.submit(request, frames)


def _token_by_token(output: RequestOutput) -> Iterator[RequestOutput]:
    """One output for each token: a step may yield several, with the end of a stop string among them."""
    num_tokens = len(output.new_token_ids) // 4
    if num_tokens < 2:
        yield output
        return
    for number in range(num_tokens):
        yield msgspec.structs.replace(
            output,
            offset=output.offset + number,
            new_token_ids=output.new_token_ids[4 * number : 4 * number + 4],
            finish_reason=output.finish_reason if number == num_tokens - 1 else None,
            logprobs=output.logprobs[number : number + 1],
            prompt_logprobs=None if number else output.prompt_logprobs,
        )


def _read_tokenizer(path: Path, expected_hash: bytes) -> Tokenizer:
    try:
        data = path.read_bytes()
    except OSError:
        raise PipelineError(
            f"{str(path)!r} cannot be read: give the client a model_folder with the files of the server's "
            "model"
        ) from None
    if tokenizer_hash(data) != expected_hash:
        raise PipelineError(f"{str(path)!r} is not the tokenizer of the server's model")
    return Tokenizer.from_buffer(data)
