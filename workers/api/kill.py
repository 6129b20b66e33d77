"""`POST /admin/kill`: has a worker killed, so that everybody can see what becomes of the open requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from aiohttp import web

from pipeline.wire.control import WorkerState
from pipeline.wire.errors import RequestError
from pipeline.wire.topology import Role, WorkerId
from workers.api.operations import ADMIN_ANSWER_S, ADMIN_ROUTES

logger = logging.getLogger(__name__)
KILL = f"{ADMIN_ROUTES}kill"
ANSWERED_S = 0.2  # from the answer to the end of the process that has given it


class KillBody(msgspec.Struct, forbid_unknown_fields=True):
    worker: str  # as in `/ready`


class KillRoute:
    """`request_kill` asks the launcher. `read` gives the body of a request."""

    def __init__(
        self,
        states: Callable[[], Sequence[WorkerState]],
        request_kill: Callable[[WorkerId], None],
        read: Callable[[web.Request], Awaitable[bytearray]],
    ) -> None:
        self._states, self._request_kill, self._read = states, request_kill, read

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """202 when the worker is dead, or for the endpoint itself will be; 404 and 409 in words, and 503
        where the launcher does not answer."""
        try:
            name = msgspec.json.decode(await self._read(request), type=KillBody).worker
        except msgspec.MsgspecError as error:
            raise RequestError(f'the body must be {{"worker": NAME}}: {error}') from None
        state = self._state_of(name)
        if state is None:
            known = ", ".join(str(one.worker) for one in self._states()) or "none yet"
            what = f"there is no worker {name[:40]!r}; there are: {known}"
            raise RequestError(what, status=404, field="worker")
        if not state.is_ready:
            raise RequestError(f"{name} is starting: it cannot be killed now", status=409, field="worker")
        logger.warning("an administrator has %s killed", name)
        if state.worker.role is Role.API:
            asyncio.get_running_loop().call_later(ANSWERED_S, self._request_kill, state.worker)
        else:
            self._request_kill(state.worker)
            await self._until_dead(state)
        return web.json_response({"status": "killed", "worker": name, "epoch": state.epoch}, status=202)

    def _state_of(self, name: str) -> WorkerState | None:
        return next((state for state in self._states() if str(state.worker) == name), None)

    async def _until_dead(self, killed: WorkerState) -> None:
        end = time.monotonic() + ADMIN_ANSWER_S
        while (state := self._state_of(str(killed.worker))) is not None and state.epoch == killed.epoch:
            if time.monotonic() > end:
                raise RequestError("the launcher does not answer", status=503)
            await asyncio.sleep(0.05)
