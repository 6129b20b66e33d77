"""Aborts that the pipeline has not confirmed yet, to be repeated. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.wire.clients import AbortRequest, RequestOutput
from pipeline.wire.sampling import FinishReason

MAX_ABORTS = 30  # messages for one request or choice, then it is dropped


@dataclass(slots=True)
class _Abort:
    message: AbortRequest
    indexes: set[int]  # of the choices without a terminal message
    num_sent: int = 1


class Aborts:
    def __init__(self) -> None:
        self._pending: dict[tuple[str, int | None], _Abort] = {}  # by request and choice; None: all choices

    def __bool__(self) -> bool:
        return bool(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return any(pending == request_id for pending, _ in self._pending)

    def add(self, message: AbortRequest, indexes: Iterable[int]) -> None:
        """`message` was sent; `indexes` are the choices that it aborts."""
        self._pending[message.request_id, message.index] = _Abort(message, set(indexes))

    def forget(self, request_id: str) -> None:
        """The attempt is over. The next attempt's submission says which choices are over."""
        for key in [key for key in self._pending if key[0] == request_id]:
            del self._pending[key]

    def on_end_of_choice(self, output: RequestOutput) -> None:
        was_aborted_alone = self._pending.pop((output.request_id, output.index), None) is not None
        if (whole := self._pending.get((output.request_id, None))) is not None:
            whole.indexes.discard(output.index)
            has_arrived = output.finish_reason is FinishReason.ABORT and not was_aborted_alone
            if has_arrived or not whole.indexes:
                del self._pending[output.request_id, None]

    def due(self) -> list[AbortRequest]:
        """The aborts to be sent again now. To be called at regular intervals."""
        messages: list[AbortRequest] = []
        for key, abort in list(self._pending.items()):
            abort.num_sent += 1
            if abort.num_sent > MAX_ABORTS:
                del self._pending[key]
            else:
                messages.append(abort.message)
        return messages
