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

from pipeline.client.client import PipelineClient
from pipeline.config import MIB, ApiConfig, ApiKey
from pipeline.families import ModelInfo
from pipeline.wire.errors import ErrorInfo, RequestError
from workers.api.bodies import BASE_BYTES, Pace, read_body, refuse_body
from workers.api.budget import Budget, Lease, memory_mib
from workers.api.chat import Chat, open_chat
from workers.api.errors import RETRY_AFTER_S, end_stream, error_response
from workers.api.metrics import exposition
from workers.api.protocol import decode_request
from workers.api.stream import ChoicePiece, Completion, read_ahead
from workers.api.tenants import peer_tenant

logger = logging.getLogger(__name__)
OPEN_ROUTES = ("/health", "/ready")
UNCOUNTED_ROUTES = (*OPEN_ROUTES, "/metrics")  # answered at once, however full the memory is
ADMIN_ROUTES = "/admin/"
ADMIN_ANSWER_S = 5.0
# Proxies hold a stream back unless they are told not to: nginx by X-Accel-Buffering.
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
BEGUN = web.RequestKey("begun", web.StreamResponse)  # the answer to a request, once its head is made
LEASE = web.RequestKey("lease", Lease)  # the memory that a request has taken
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _given_key(request: web.Request) -> bytes:
    """The key of `Authorization: Bearer KEY`, empty if there is none. The scheme has no case (RFC 9110)."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""


def _has_left(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


class ApiServer:
    """`client` may not be connected yet: requests wait for `set_ready`, at most `recovery_timeout_s`."""

    def __init__(
        self,
        config: ApiConfig,
        client: PipelineClient,
        model_name: str,
        info: ModelInfo,
        request_reload: Callable[[], None] = lambda: None,
        recovery_timeout_s: float = 60.0,
        pace: Pace | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._request_reload, self._recovery_timeout_s = request_reload, recovery_timeout_s
        self._config, self._client, self._model_name, self._info = config, client, model_name, info
        self._keys = config.keys
        self._pace, self._budget = pace or Pace(), budget or Budget(memory_mib(config) * MIB)
        self._created = int(time.time())
        self.is_ready = False
        self._is_settled = asyncio.Event()  # ready, or never to be
        self.is_retiring = False  # connections end with the next answer on them
        self.num_handled = 0  # requests under way
        self.num_waiting = 0  # of them, for the pipeline to be ready
        self.handled_at = 0.0  # when the last one was

    def set_ready(self) -> None:
        self.is_ready = True
        self._is_settled.set()

    def give_up(self) -> None:
        """The pipeline has ended before it was ready: who waits is told."""
        self._is_settled.set()

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard])
        application.on_response_prepare.append(self._on_head)
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
        self.num_handled += 1
        request[LEASE] = lease = Lease(self._budget, self._tenant(request))
        try:
            return await self._answer(request, handler)
        finally:
            lease.close()
            self.num_handled -= 1
            self.handled_at = time.monotonic()

    async def _on_head(self, request: web.Request, response: web.StreamResponse) -> None:
        """Notes that an answer has begun, and says in its head if the connection ends with it.

        A client that was not told may send its next request on the connection. What is left of a body that
        was refused would be taken for the next request.
        """
        request[BEGUN] = response
        if self.is_retiring or not request.content.is_eof():
            response.force_close()
            response.headers["Connection"] = "close"  # the head is made before this hook

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keys, and OpenAI's error object for whatever goes wrong: in the stream, if it has begun."""
        try:
            self._admit(request)
            if request.path not in UNCOUNTED_ROUTES:
                await request[LEASE].grow(BASE_BYTES)
            return await handler(request)
        except asyncio.CancelledError:
            # The client has gone, or the server ends: then its readers are told.
            if (begun := request.get(BEGUN)) is not None:
                await end_stream(begun, ErrorInfo(503, "the server is shutting down"))
            raise
        except RequestError as error:
            return await self._fail(request, error.info)
        except web.HTTPException as error:
            what = f"{request.method} {request.path}: {error.reason}"
            response = await self._fail(request, ErrorInfo(error.status, what))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response
        except MemoryError:
            logger.error("%s %s: no memory is left", request.method, request.path)
            return await self._fail(request, ErrorInfo(503, "the server has no memory left for this request"))
        except Exception as error:
            if isinstance(error, ConnectionError) and _has_left(request):
                logger.debug("%s %s: the client went away", request.method, request.path)
            else:
                logger.exception("%s %s failed", request.method, request.path)
            return await self._fail(request, ErrorInfo(500, "the server made a mistake"))

    async def _fail(self, request: web.Request, error: ErrorInfo) -> web.StreamResponse:
        begun: web.StreamResponse | None = request.get(BEGUN)
        if begun is None:
            return error_response(error)
        await end_stream(begun, error)
        return begun

    def _admit(self, request: web.Request) -> None:
        """Raises RequestError for what is refused by its head alone; its body is not looked at."""
        refuse_body(request, self._config.max_request_mib)
        if request.path.startswith(ADMIN_ROUTES):
            if not hmac.compare_digest(_given_key(request), self._config.admin_key.encode()):
                raise RequestError("the admin key is needed: Authorization: Bearer KEY", status=401)
        elif self._keys and request.path not in OPEN_ROUTES and self._key_of(request) is None:
            raise RequestError("a valid API key is needed: Authorization: Bearer KEY", status=401)

    def _key_of(self, request: web.Request) -> ApiKey | None:
        """All keys are compared, whichever fits: the time it takes says nothing of them."""
        given = _given_key(request)
        fits = [hmac.compare_digest(given, key.key.encode()) for key in self._keys]
        return next((key for key, does_fit in zip(self._keys, fits, strict=True) if does_fit), None)

    def _tenant(self, request: web.Request) -> str:
        """On whose behalf a request is: the name of its key, else the address that it comes from."""
        key = self._key_of(request)
        if key is not None:
            return f"key:{key.name}"
        forwarded = request.headers.getall("X-Forwarded-For", []) if self._config.trust_forwarded_for else []
        return peer_tenant(request.remote, forwarded)

    async def _until_ready(self) -> None:
        """Raises RequestError when the pipeline does not become ready in time, or ends."""
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self._recovery_timeout_s):
                await self._is_settled.wait()
        except TimeoutError:
            what = f"the server did not start within {self._recovery_timeout_s:.0f} s"
            raise RequestError(what, status=503) from None
        finally:
            self.num_waiting -= 1
        if not self.is_ready:
            raise RequestError(self._client.failure or "the server has stopped", status=503)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if not self.is_ready or self._client.failure or self._client.is_draining:
            return error_response(ErrorInfo(503, self._client.failure or "not serving"))
        return web.Response()

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        """Which workers serve; 503 while one of them does not.

        Requests that come meanwhile are taken in and wait.
        """
        workers = {
            str(state.worker): "ready" if state.is_ready else "starting" for state in self._client.workers
        }
        is_ready = (
            self.is_ready
            and not self._client.failure
            and not self._client.is_draining
            and set(workers.values()) == {"ready"}
        )
        body = {"ready": is_ready, "draining": self._client.is_draining, "workers": workers}
        return web.json_response(
            body, status=200 if is_ready else 503, headers={} if is_ready else {"Retry-After": RETRY_AFTER_S}
        )

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
        return web.Response(
            body=exposition(self._client.workers).encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _models(self, request: web.Request) -> web.StreamResponse:
        """Scripts ask for it to learn that the server has started: it waits until then."""
        await self._until_ready()
        card = {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "local"}
        return web.json_response({"object": "list", "data": [card]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        await self._until_ready()
        chat = await self._open(request)
        async with aclosing(read_ahead(chat.pieces)) as pieces:
            if not chat.is_streamed:
                return web.json_response(await chat.completion.whole(pieces))
            return await self._stream(request, chat.completion, pieces, chat.include_usage)

    async def _open(self, request: web.Request) -> Chat:
        """What outlives this call has the media once: the body, and what was decoded from it, are gone."""
        lease = request[LEASE]
        body = decode_request(await read_body(request, lease, self._pace, self._config.max_request_mib))
        salt = self._cache_salt(request, body.cache_salt or "")
        chat = open_chat(self._client, body, self._model_name, self._info, salt, self._tenant(request))
        lease.keep(chat.media)
        return chat

    def _cache_salt(self, request: web.Request, salt: str) -> bytes:
        """Who shares cached prefixes: requests with one key's name and one salt.

        The first key of the name goes in, too, so that nobody guesses it who knows the name.
        """
        if not self._keys and not salt:
            return b""
        key = self._key_of(request)
        first = next((other for other in self._keys if key and other.name == key.name), None)
        owner = hashlib.sha256(f"{first.name}:{first.key}".encode() if first else b"").digest()
        return hashlib.sha256(owner + salt.encode("utf-8", "surrogatepass")).digest()

    async def _stream(
        self,
        request: web.Request,
        completion: Completion,
        pieces: AsyncGenerator[ChoicePiece, None],
        include_usage: bool,
    ) -> web.StreamResponse:
        # The status goes out with the first token or the failure: a broken picture is a 4xx, also when
        # streaming.
        first = await anext(pieces)
        response = web.StreamResponse(headers=STREAM_HEADERS)
        await response.prepare(request)
        async for data in completion.events(first, pieces, include_usage):
            await response.write(data)
        return response
