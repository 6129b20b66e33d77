"""The items of a response, and the events by which a stream tells of them. Pure."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, assert_never

from workers.api.blocks import AnswerBlock, BlockEvent, BlockKind, Closed, Grown, Opened
from workers.api.server_sent_events import event

Json = dict[str, Any]
COMPLETED, IN_PROGRESS = "completed", "in_progress"


class ItemWriter:
    """Gives each block of an answer one id, wherever the block is shown."""

    def __init__(self) -> None:
        self._ids: dict[int, tuple[str, str]] = {}  # by the block's index: of the item, of the call

    def item(self, block: AnswerBlock, status: str = COMPLETED, logprobs: Sequence[Json] = ()) -> Json:
        item_id, call_id = self._ids_of(block)
        is_open = status == IN_PROGRESS
        match block.kind:
            case BlockKind.TEXT:
                content = [] if is_open else [_text_part(block.text, logprobs)]
                return {
                    "id": item_id, "type": "message", "role": "assistant", "status": status,
                    "content": content,
                }  # fmt: skip
            case BlockKind.THOUGHT:
                content = [] if is_open else [{"type": "reasoning_text", "text": block.text}]
                return {
                    "id": item_id, "type": "reasoning", "summary": [], "content": content, "status": status,
                }  # fmt: skip
            case BlockKind.CALL:
                return {
                    "id": item_id, "type": "function_call", "call_id": call_id, "name": block.name,
                    "arguments": "" if is_open else block.text, "status": status,
                }  # fmt: skip
            case _:
                assert_never(block.kind)

    def _ids_of(self, block: AnswerBlock) -> tuple[str, str]:
        if block.index not in self._ids:
            prefix = {BlockKind.TEXT: "msg", BlockKind.THOUGHT: "rs", BlockKind.CALL: "fc"}[block.kind]
            self._ids[block.index] = f"{prefix}_{uuid.uuid4().hex}", f"call_{uuid.uuid4().hex}"
        return self._ids[block.index]


class EventWriter:
    """Numbers the events of a stream."""

    def __init__(self, items: ItemWriter) -> None:
        self._items, self._numbers = items, itertools.count()

    def event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return f"event: {kind}\n".encode() + event(body)

    def of_block(
        self, one: BlockEvent, logprobs: Sequence[Json] = (), status: str = COMPLETED
    ) -> Iterator[bytes]:
        """`logprobs`: of the text that this adds or, when it closes, of all of it."""
        block = one.block
        item_id = self._items.item(block, IN_PROGRESS)["id"]
        place = {"item_id": item_id, "output_index": block.index}
        in_part = {**place, "content_index": 0}
        match one:
            case Opened():
                item = self._items.item(block, IN_PROGRESS)
                yield self.event("response.output_item.added", output_index=block.index, item=item)
                if block.kind is not BlockKind.CALL:
                    yield self.event("response.content_part.added", **in_part, part=_part(block.kind, ""))
            case Grown(_, text):
                match block.kind:
                    case BlockKind.TEXT:
                        further = {"logprobs": list(logprobs)}
                        yield self.event("response.output_text.delta", **in_part, delta=text, **further)
                    case BlockKind.THOUGHT:
                        yield self.event("response.reasoning_text.delta", **in_part, delta=text)
                    case BlockKind.CALL:
                        yield self.event("response.function_call_arguments.delta", **place, delta=text)
                    case _:
                        assert_never(block.kind)
            case Closed():
                yield from self._close(block, place, in_part, logprobs)
                item = self._items.item(block, status, logprobs)
                yield self.event("response.output_item.done", output_index=block.index, item=item)
            case _:
                assert_never(one)

    def _close(
        self, block: AnswerBlock, place: Json, in_part: Json, logprobs: Sequence[Json]
    ) -> Iterator[bytes]:
        text = block.text
        match block.kind:
            case BlockKind.TEXT:
                yield self.event("response.output_text.done", **in_part, text=text, logprobs=list(logprobs))
            case BlockKind.THOUGHT:
                yield self.event("response.reasoning_text.done", **in_part, text=text)
            case BlockKind.CALL:
                yield self.event(
                    "response.function_call_arguments.done", **place, name=block.name, arguments=text
                )
                return
            case _:
                assert_never(block.kind)
        part = _text_part(text, logprobs) if block.kind is BlockKind.TEXT else _part(block.kind, text)
        yield self.event("response.content_part.done", **in_part, part=part)


def _part(kind: BlockKind, text: str) -> Json:
    return _text_part(text) if kind is BlockKind.TEXT else {"type": "reasoning_text", "text": text}


def _text_part(text: str, logprobs: Sequence[Json] = ()) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
