"""The HTTP routes. One client of the pipeline among others: it uses the client library as a script does."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from aiohttp import web

from pipeline.client import PipelineClient
from pipeline.config import MIB, ApiConfig
from pipeline.errors import ErrorInfo, RequestError
from pipeline.families import ModelInfo
from workers.api.chat import open_chat
from workers.api.metrics import exposition
from workers.api.protocol import decode_request, error_body
from workers.api.stream import DONE, ChoicePiece, Completion, error_event, side_by_side
from workers.api.tenants import key_tenant, peer_tenant

logger = logging.getLogger(__name__)
RETRY_AFTER_S = "2"
OPEN_ROUTES = ("/health", "/ready")
ADMIN_ROUTES = "/admin/"
ADMIN_ANSWER_S = 5.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_response(error: ErrorInfo) -> web.Response:
    headers = {"Retry-After": RETRY_AFTER_S} if error.status in (429, 503) else {}
    return web.json_response(error_body(error), status=error.status, headers=headers)


def _given_key(request: web.Request) -> bytes:
    return request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")


class ApiServer:
    """`client` may not be connected yet: until `is_ready` every request is answered with 503."""

    def __init__(
        self, config: ApiConfig, client: PipelineClient, model_name: str, info: ModelInfo, request_reload: Callable[[], None] = lambda: None
    ) -> None:
        self._request_reload = request_reload
        self._config, self._client, self._model_name, self._info = config, client, model_name, info
        self._keys = [key.encode() for key in config.api_key]
        self._created = int(time.time())
        self.is_ready = False
        self.is_retiring = False  # connections end with the next answer on them
        self.num_handled = 0  # requests under way
        self.handled_at = 0.0  # when the last one was

    def application(self) -> web.Application:
        application = web.Application(client_max_size=self._config.max_request_mib * MIB, middlewares=[self._guard])
        application.on_response_prepare.append(self._announce_end)
        application.router.add_get("/health", self._health)
        application.router.add_get("/ready", self._ready)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/v1/models", self._models)
        if self._config.admin_key:
            application.router.add_post("/admin/reload", self._reload)
        application.router.add_post("/v1/chat/completions", self._chat)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keys, and OpenAI's error object for whatever goes wrong."""
        self.num_handled += 1
        try:
            return await self._answer(request, handler)
        finally:
            self.num_handled -= 1
            self.handled_at = time.monotonic()

    async def _announce_end(self, request: web.Request, response: web.StreamResponse) -> None:
        """Says in the head of an answer that its connection ends with it: who was not told may send the next request on it."""
        if self.is_retiring:
            response.force_close()
            response.headers["Connection"] = "close"  # the head is made before this hook

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path.startswith(ADMIN_ROUTES):
                if not hmac.compare_digest(_given_key(request), self._config.admin_key.encode()):
                    return error_response(ErrorInfo(401, "the admin key is needed: Authorization: Bearer KEY"))
            elif self._keys and request.path not in OPEN_ROUTES and not self._is_authorized(request):
                return error_response(ErrorInfo(401, "a valid API key is needed: Authorization: Bearer KEY"))
            return await handler(request)
        except RequestError as error:
            return error_response(error.info)
        except web.HTTPRequestEntityTooLarge:
            return error_response(ErrorInfo(413, f"the body is larger than {self._config.max_request_mib} MiB"))
        except web.HTTPException as error:
            return error_response(ErrorInfo(error.status, f"{request.method} {request.path}: {error.reason}"))
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            return error_response(ErrorInfo(500, "the server made a mistake"))

    def _is_authorized(self, request: web.Request) -> bool:
        given = _given_key(request)
        fits = [hmac.compare_digest(given, key) for key in self._keys]  # all are compared, whichever fits
        return any(fits)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if not self.is_ready or self._client.failure or self._client.is_draining:
            return error_response(ErrorInfo(503, self._client.failure or "not serving"))
        return web.Response()

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        """Which workers serve; 503 while one of them does not. Requests that come meanwhile are taken in and wait."""
        workers = {str(state.worker): "ready" if state.is_ready else "starting" for state in self._client.workers}
        is_ready = self.is_ready and not self._client.failure and not self._client.is_draining and set(workers.values()) == {"ready"}
        body = {"ready": is_ready, "draining": self._client.is_draining, "workers": workers}
        return web.json_response(body, status=200 if is_ready else 503, headers={} if is_ready else {"Retry-After": RETRY_AFTER_S})

    async def _reload(self, request: web.Request) -> web.StreamResponse:
        """202 when it has begun, 409 with the reason when the launcher refuses."""
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

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=exposition(self._client.workers).encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        card = {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "local"}
        return web.json_response({"object": "list", "data": [card]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = decode_request(await request.read())
        if not self.is_ready:
            raise RequestError("the server is still starting", status=503)
        salt = self._cache_salt(request, body.cache_salt or "")
        chat = open_chat(self._client, body, self._model_name, self._info, salt, self._tenant(request))
        async with aclosing(side_by_side(chat.choices)) as pieces:
            if not body.stream:
                return web.json_response(await chat.completion.whole(pieces))
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return await self._stream(request, chat.completion, pieces, include_usage)

    def _tenant(self, request: web.Request) -> str:
        """Whose turn the request takes: its key's, else its peer's."""
        if self._keys:
            return key_tenant(_given_key(request))
        forwarded = request.headers.getall("X-Forwarded-For", []) if self._config.trust_forwarded_for else []
        return peer_tenant(request.remote, forwarded)

    def _cache_salt(self, request: web.Request, salt: str) -> bytes:
        """Who shares cached prefixes: requests with one key and one salt."""
        if not self._keys and not salt:
            return b""
        key = _given_key(request) if self._keys else b""
        return hashlib.sha256(hashlib.sha256(key).digest() + salt.encode("utf-8", "surrogatepass")).digest()

    async def _stream(
        self, request: web.Request, completion: Completion, pieces: AsyncGenerator[ChoicePiece, None], include_usage: bool
    ) -> web.StreamResponse:
        # The status goes out with the first token or the failure: a broken picture is a 4xx, also when streaming.
        first = await anext(pieces)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
        await response.prepare(request)
        try:
            async for data in completion.events(first, pieces, include_usage):
                await response.write(data)
        except RequestError as error:  # too late for a status: told inside the stream
            await response.write(error_event(error.info) + DONE)
        except ConnectionResetError:
            logger.debug("the reader of %s went away", completion.completion_id)
        return response
