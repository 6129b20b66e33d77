"""Reads of a submission's media and prompt what the LLM needs before any pixel is decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from pipeline.families import ModelInfo, PlacedMedia, Placeholders, Positions
from pipeline.process.trace import Tracer
from pipeline.wire.clients import SubmitRequest
from pipeline.wire.errors import RequestError, context_overflow
from pipeline.wire.limits import MAX_ITEMS
from pipeline.wire.prompts import Chat, ImagePart, Prompt, TextPart, Tokens, VideoPart
from pipeline.wire.sampling import SamplingParams
from workers.preprocess.item_reader import ItemReader, Scope
from workers.preprocess.media import Item, gather
from workers.preprocess.prompt import PromptBuilder, TokenizedPrompt, truncated
from workers.preprocess.threads import FairThreads

MAX_PROMPT_LOGPROBS = 1 << 18  # of one request: 2 MiB


class Prepared(NamedTuple):
    items: list[Item]
    prompt: TokenizedPrompt
    positions: Positions
    sampling: SamplingParams


class PromptReader:
    """`threads` are for texts only, which so never wait for media. `max_model_len`: the option's value."""

    def __init__(
        self,
        info: ModelInfo,
        max_items: int,
        items: ItemReader,
        threads: FairThreads,
        max_model_len: int | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._info, self._max_items, self._items, self._threads = info, max_items, items, threads
        self._max_model_len, self._tracer = max_model_len, tracer
        self.builder = PromptBuilder(info.folder, info.image_token_id, info.video_token_id, self._limit)

    @property
    def _limit(self) -> int:
        most = self._info.text.max_position_embeddings
        return most if self._max_model_len is None else min(most, self._max_model_len)

    async def read(
        self,
        message: SubmitRequest,
        frames: list[memoryview],
        tenant: str,
        hold: Callable[[int], None],
        encoder: bytes = b"",
    ) -> Prepared:
        """Fetches media, reads their sizes and hashes, and tokenises the prompt.

        `hold` is called with the number of bytes of encoded media as they arrive. `encoder` as in `Scope`.
        Raises RequestError.
        """
        parts = list(_located_media(message.prompt))
        self._check_counts([part for part, _ in parts])
        scope = Scope(tenant, message.cache_salt, encoder)
        start = time.monotonic()
        items = await gather(self._items.read(part, field, frames, scope, hold) for part, field in parts)
        if parts:
            self._trace("fetch", start, message)
        limit = self._limit
        if (total := sum(map(_num_placeholders, items))) > limit:
            raise RequestError.from_info(
                context_overflow(limit, total, message.sampling.max_tokens, "messages", is_least=True)
            )
        segments = [item.segments for item in items]
        start = time.monotonic()
        prompt: TokenizedPrompt = await self._threads.run(self.builder.build, message.prompt, segments)
        self._trace("tokenise", start, message, len(prompt.token_ids))
        prompt = truncated(prompt, message.sampling.num_kept_of_prompt(limit))
        if (total := len(prompt.token_ids)) > limit:
            field = "messages" if isinstance(message.prompt, Chat) else "prompt"
            raise RequestError.from_info(context_overflow(limit, total, message.sampling.max_tokens, field))
        sampling = message.sampling
        if sampling.bad_words:
            banned = await self._threads.run(self.builder.token_sequences, sampling.bad_words)
            banned = (*sampling.banned_token_ids, *banned)
            sampling = msgspec.structs.replace(sampling, bad_words=(), banned_token_ids=banned)
        best = sampling.prompt_logprobs
        if best is not None and total * (1 + best) > MAX_PROMPT_LOGPROBS:
            what = f"{1 + best} log-probabilities for each of {total} prompt tokens are more than"
            raise RequestError(f"{what} the limit of {MAX_PROMPT_LOGPROBS}", field="prompt_logprobs")
        placed = [PlacedMedia(item.media, spans) for item, spans in zip(items, prompt.spans, strict=True)]
        positions: Positions = await self._threads.run(self._info.family.positions, total, placed, self._info)
        return Prepared(items, prompt, positions, sampling)

    def _trace(self, name: str, start: float, message: SubmitRequest, amount: int = 0) -> None:
        if self._tracer is not None:
            self._tracer.span(name, start, [message.request_id], amount)

    def _check_counts(self, parts: Sequence[ImagePart | VideoPart]) -> None:
        num_pictures = sum(max(1, len(part.frames)) if isinstance(part, VideoPart) else 1 for part in parts)
        if num_pictures > MAX_ITEMS:
            raise RequestError(
                f"the request has {num_pictures} pictures and frames, the limit is {MAX_ITEMS}",
                field="messages",
            )
        if (count := len(parts)) > self._max_items:
            raise RequestError(
                f"the request has {count} pictures and videos, the limit is {self._max_items}",
                field="messages",
            )


def _num_placeholders(item: Item) -> int:
    return sum(segment.num_tokens for segment in item.segments if isinstance(segment, Placeholders))


def _located_media(prompt: Prompt) -> Iterable[tuple[ImagePart | VideoPart, str]]:
    """The pictures and videos of a prompt, each with the name of its field."""
    if isinstance(prompt, Tokens):
        yield from ((part, f"media[{index}]") for index, part in enumerate(prompt.media))
    for number, message in enumerate(prompt.messages if isinstance(prompt, Chat) else ()):
        if not isinstance(message.content, str):
            for index, part in enumerate(message.content):
                if not isinstance(part, TextPart):
                    kind = "image_url" if isinstance(part, ImagePart) else "video_url"
                    yield part, f"messages[{number}].content[{index}].{kind}"
