"""What one page that shows the lanes is sent, and what it may see. Pure.

Work of all requests is shown, but a tenant learns the ids of its own requests only: of others it sees that
work was done, and when.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pipeline.wire.control import WorkerState
from pipeline.wire.lanes import LaneSpan, WorkDone
from pipeline.wire.topology import Role, WorkerId

MAX_PENDING = 2048  # pieces of work that a page has not been sent yet; the oldest go
MAX_NUMBERED = 1024  # requests that have a number
OTHERS = 0  # the number of all requests that the viewer may not see
SILENCE_S = 5.0  # after which something is sent, so that nobody takes the connection for dead
ALIVE = b": \n\n"
Json = dict[str, Any]
OwnerOf = Callable[[str], str | None]


def named_event(name: str, body: Json) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(body))


class LaneViewer:
    """`owner_of`: the tenant of a request. `kill`: whether the page may have workers killed, "allowed", "with
    key" or "off". `tp_size`: ranks of a group, which all compute the same steps.

    Times are seconds of the machine's monotonic clock; a page is told milliseconds since `now`.
    """

    def __init__(
        self, tenant: str, sees_all: bool, kill: str, owner_of: OwnerOf, tp_size: int, now: float
    ) -> None:
        self.tenant, self._sees_all, self._kill = tenant, sees_all, kill
        self._owner_of, self._tp_size, self._began = owner_of, tp_size, now
        self._told_at = now
        self._pending: list[tuple[WorkDone, LaneSpan]] = []
        self._lanes: list[Json] | None = None
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._num_numbered = 0
        self.num_dropped = 0

    def add(self, work: WorkDone) -> None:
        self._pending += [(work, span) for span in work.spans]
        if (num_excess := len(self._pending) - MAX_PENDING) > 0:
            del self._pending[:num_excess]
            self.num_dropped += num_excess

    def take(self, states: Sequence[WorkerState], now: float) -> bytes:
        """The events since the last call; empty if there is nothing to tell."""
        data = self._lanes_event(states, now) + self._work_event(states, now)
        if not data and now - self._told_at >= SILENCE_S:
            data = ALIVE
        if data:
            self._told_at = now
        return data

    def _ms(self, at: float) -> float:
        return round((at - self._began) * 1000, 1)

    def _lanes_event(self, states: Sequence[WorkerState], now: float) -> bytes:
        """At the start, and when a worker has died or a successor serves."""
        lanes = [self._lane(state) for state in states]
        if lanes == self._lanes:
            return b""
        self._lanes = lanes
        sees = "all" if self._sees_all else "own"
        return named_event("lanes", {"at": self._ms(now), "lanes": lanes, "sees": sees, "kill": self._kill})

    def _lane(self, state: WorkerState) -> Json:
        worker = state.worker
        lane = {"worker": str(worker), "epoch": state.epoch, "is_ready": state.is_ready}
        if worker.role is Role.LLM and (lead := worker.rank // self._tp_size * self._tp_size) != worker.rank:
            lane["lead"] = str(WorkerId(Role.LLM, lead))
        return lane

    def _work_event(self, states: Sequence[WorkerState], now: float) -> bytes:
        """Of a worker that has died meanwhile nothing goes on: nobody would tell the page its end."""
        alive = {(state.worker, state.epoch) for state in states if state.is_ready}
        told = [
            (done.sender, span)
            for done, span in self._pending
            if span.end is not None or (done.sender, done.epoch) in alive
        ]
        self._pending.clear()
        if not told:
            return b""
        work: dict[str, list[list[Any]]] = {}
        requests: dict[int, Json] = {}
        for worker, span in told:
            work.setdefault(str(worker), []).append(self._row(span, requests))
        body: Json = {"at": self._ms(now), "work": work}
        if requests:
            body["requests"] = requests
        if self.num_dropped:
            body["dropped"] = self.num_dropped
        return named_event("work", body)

    def _row(self, span: LaneSpan, requests: dict[int, Json]) -> list[Any]:
        """Name, start, duration (null: it goes on), numbers of the requests, amount, number of steps. Amounts
        of work for others are not told."""
        numbers = {self._number(request_id, requests): None for request_id in span.request_ids}
        amount = 0 if OTHERS in numbers else span.amount
        duration = None if span.end is None else round((span.end - span.start) * 1000, 1)
        return [span.name, self._ms(span.start), duration, [*numbers], amount, span.num_steps]

    def _number(self, request_id: str, requests: dict[int, Json]) -> int:
        """`requests` takes what is new to the page."""
        if (number := self._numbers.get(request_id)) is not None:
            self._numbers.move_to_end(request_id)
            return number
        is_mine = self._owner_of(request_id) == self.tenant
        if not (is_mine or self._sees_all):
            return OTHERS
        self._num_numbered += 1
        self._numbers[request_id] = number = self._num_numbered
        requests[number] = {"id": request_id, "is_mine": is_mine}
        if len(self._numbers) > MAX_NUMBERED:
            self._numbers.popitem(last=False)
        return number
