"""`GET /lanes/events`: what each worker does, live, as server-sent events (docs/lanes.md).

While at least one page looks, the launcher is told so again and again, and lets the workers tell of their
work. A page that reads too slowly loses the oldest of it, and at last its connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

from pipeline.wire.control import WorkerState
from pipeline.wire.errors import RequestError
from pipeline.wire.lanes import WorkDone
from workers.api.access import Access
from workers.api.lane_viewer import LaneViewer
from workers.api.operations import LANES
from workers.api.owners import Owners
from workers.api.server_sent_events import STREAM_HEADERS

INTERVAL_S = 0.2  # between two events for a page
ANNOUNCED_S = 4.0  # for which the launcher is told that somebody looks
ANNOUNCE_EVERY_S = 1.0
MAX_VIEWERS, MAX_OF_A_TENANT = 32, 8
KEPT_FOR_ADMINS = 4  # of the viewers
SLOW_S = 10.0  # for which a page may read nothing


class LaneRoutes:
    """`announce` tells the launcher for how many seconds somebody looks. `is_over`: no page is to be served
    any longer. `tp_size`: ranks of a group."""

    def __init__(
        self,
        states: Callable[[], Sequence[WorkerState]],
        announce: Callable[[float], None],
        access: Access,
        is_over: Callable[[], bool],
        tp_size: int = 1,
    ) -> None:
        self._states, self._announce, self._access = states, announce, access
        self._is_over, self._tp_size = is_over, tp_size
        self._owners = Owners()
        self._viewers: set[LaneViewer] = set()
        self._announce_due = 0.0
        self.num_messages = 0  # of workers

    def routes(self) -> list[web.RouteDef]:
        return [web.get(LANES, self._events, allow_head=False)]

    @contextmanager
    def owned(self, request_ids: Sequence[str], tenant: str) -> Iterator[None]:
        """While these requests of the tenant are answered."""
        self._owners.begin(request_ids, tenant)
        try:
            yield
        finally:
            self._owners.end(request_ids, time.monotonic())

    def on_work(self, work: WorkDone) -> None:
        self.num_messages += 1
        for viewer in self._viewers:
            viewer.add(work)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        viewer = self._viewer_of(request)
        num_own = sum(other.tenant == viewer.tenant for other in self._viewers)
        must_leave_some = self._access.has_admin and not self._access.is_admin(request)
        most = MAX_VIEWERS - KEPT_FOR_ADMINS if must_leave_some else MAX_VIEWERS
        if len(self._viewers) >= most or num_own >= MAX_OF_A_TENANT:
            raise RequestError("as many pages as may show the lanes do so already", status=429)
        self._viewers.add(viewer)
        response = web.StreamResponse(headers=STREAM_HEADERS)
        try:
            await response.prepare(request)
            while not self._is_over():
                self._keep_watched(time.monotonic())
                if data := viewer.take(self._states(), time.monotonic()):
                    async with asyncio.timeout(SLOW_S):
                        await response.write(data)
                await asyncio.sleep(INTERVAL_S)
            response.force_close()  # its head could not say so yet
        except TimeoutError:  # an orderly end would wait for this page, too
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._announce(0.0)
                self._announce_due = 0.0
        return response

    def _viewer_of(self, request: web.Request) -> LaneViewer:
        access = self._access
        kill = ("allowed" if access.is_admin(request) else "with key") if access.has_admin else "off"
        return LaneViewer(
            access.tenant(request), access.sees_all(request), kill, self._owners.tenant_of, self._tp_size,
            time.monotonic(),
        )  # fmt: skip

    def _keep_watched(self, now: float) -> None:
        if now >= self._announce_due:
            self._announce_due = now + ANNOUNCE_EVERY_S
            self._announce(ANNOUNCED_S)
