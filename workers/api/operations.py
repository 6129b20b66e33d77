"""The operator's routes: health, load, version, metrics and reload."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

from aiohttp import web
from prometheus_client.registry import Collector

from pipeline.client.client import PipelineClient
from pipeline.wire.errors import ErrorInfo, RequestError
from workers.api.errors import RETRY_AFTER_S, error_response
from workers.api.metrics import CONTENT_TYPE, WorkerCollector, exposition

METRICS = "/metrics"
OPEN_ROUTES = ("/health", "/ready", "/ping")  # need no key
PACKAGE = "vlm-pipeline"
UNCOUNTED_ROUTES = (*OPEN_ROUTES, METRICS)  # take nothing from the memory budget
ADMIN_ROUTES = "/admin/"
ADMIN_ANSWER_S = 5.0


class Load(NamedTuple):
    num_unfinished: int  # requests to the model
    num_waiting: int  # requests that wait for the pipeline to be ready


class Operations:
    """`is_ready`: the client is connected. `keys`: the metrics of API keys that a reader may see."""

    def __init__(
        self,
        client: PipelineClient,
        is_ready: Callable[[], bool],
        load: Callable[[], Load],
        request_reload: Callable[[], None],
        keys: Callable[[web.Request], Collector],
        model: str,
        has_vllm_names: bool,
    ) -> None:
        self._client, self._is_ready, self._request_reload = client, is_ready, request_reload
        self._measure_load, self._keys = load, keys
        self._collector = WorkerCollector(lambda: client.workers, lambda: client.leads, model, has_vllm_names)

    def routes(self, has_admin: bool) -> list[web.RouteDef]:
        found = [
            web.get("/health", self._health),
            web.get("/ping", self._health),
            web.get("/ready", self._ready),
            web.get("/load", self._load),
            web.get("/version", self._version),
            web.get(METRICS, self._metrics),
        ]
        return [*found, web.post(f"{ADMIN_ROUTES}reload", self._reload)] if has_admin else found

    @property
    def _is_serving(self) -> bool:
        return self._is_ready() and not self._client.failure and not self._client.is_draining

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if not self._is_serving:
            return error_response(ErrorInfo(503, self._client.failure or "not serving"))
        return web.Response()

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        """The state of each worker; 503 while one does not serve.

        Requests are accepted meanwhile, and wait.
        """
        workers = {
            str(state.worker): "ready" if state.is_ready else "starting" for state in self._client.workers
        }
        is_ready = self._is_serving and set(workers.values()) == {"ready"}
        body = {"ready": is_ready, "draining": self._client.is_draining, "workers": workers}
        return web.json_response(
            body, status=200 if is_ready else 503, headers={} if is_ready else {"Retry-After": RETRY_AFTER_S}
        )

    async def _load(self, request: web.Request) -> web.StreamResponse:
        """`server_load` is vLLM's name for the number of unfinished requests."""
        load = self._measure_load()
        return web.json_response({"server_load": load.num_unfinished, "waiting_for_start": load.num_waiting})

    async def _version(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": version()})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        body = exposition(self._collector) + exposition(self._keys(request))
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _reload(self, request: web.Request) -> web.StreamResponse:
        """202 when the reload has begun, 409 with the reason when the launcher refuses it."""
        number = self._client.reload.number
        self._request_reload()
        end = time.monotonic() + ADMIN_ANSWER_S
        while self._client.reload.number == number and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if self._client.reload.number == number:
            raise RequestError("the launcher does not answer", status=503)
        if self._client.reload.refusal:
            raise RequestError(self._client.reload.refusal, status=409)
        return web.json_response({"status": "reloading"}, status=202)


def version() -> str:
    """Of the installed package."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"
