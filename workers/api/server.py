"""The HTTP server: turns a request into its route's answer, or into an error.

It is an ordinary client of the pipeline, through the client library. It knows no route by name.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import msgspec
from aiohttp import web
from prometheus_client.registry import Collector

from pipeline.client.client import PipelineClient
from pipeline.config import MIB, ApiConfig
from pipeline.families import ModelInfo
from pipeline.parsers.forms import ChatForms
from pipeline.process.otlp import OtlpSpans
from pipeline.wire.errors import ErrorInfo, RequestError
from workers.api.access import Access
from workers.api.access_log import HEADERS, RECORD, RequestRecord, request_id_of, writer_of
from workers.api.admission import Admission
from workers.api.answer import Update
from workers.api.bodies import BASE_BYTES, BodyPace, read_body, refuse_body, refuse_type
from workers.api.budget import Budget, BudgetLease, memory_mib
from workers.api.cors import Cors
from workers.api.description.document import PATH, ServerFacts, document
from workers.api.endpoints.base import Endpoint, Inquiry, Json, Route, ServedModel
from workers.api.endpoints.registry import routes
from workers.api.errors import end_stream, error_response
from workers.api.generation import Generation
from workers.api.hosts import Hosts
from workers.api.key_metrics import KeyMetrics
from workers.api.kill import KILL, KillRoute
from workers.api.lanes import LaneRoutes
from workers.api.launcher_requests import LauncherRequests
from workers.api.operations import UNCOUNTED_ROUTES, Load, Operations
from workers.api.page.routes import Page, is_page
from workers.api.paths import explain, spellings
from workers.api.request_trace import RequestTrace
from workers.api.response_store import ResponseStore
from workers.api.server_sent_events import STREAM_HEADERS
from workers.api.submission import Submission

logger = logging.getLogger(__name__)
MAX_SHOWN_NAMES, MAX_SHOWN_NAME = 10, 40  # of ignored fields, in a header
BEGUN = web.RequestKey("begun", web.StreamResponse)  # the response to a request, once its head is prepared
TRACE = web.RequestKey("trace", RequestTrace)  # of a question to the model, if it is traced
LEASE = web.RequestKey("lease", BudgetLease)  # the memory that a request has taken
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _has_left(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


class ApiServer:
    """`client` may not be connected yet: requests wait for `set_ready`, at most `recovery_timeout_s`."""

    def __init__(
        self,
        config: ApiConfig,
        client: PipelineClient,
        model_names: tuple[str, ...],
        info: ModelInfo,
        launcher: LauncherRequests | None = None,
        recovery_timeout_s: float = 60.0,
        pace: BodyPace | None = None,
        budget: Budget | None = None,
        forms: ChatForms | None = None,
        spans: OtlpSpans | None = None,
        tp_size: int = 1,
        samples: Path | None = None,
        adapters: tuple[str, ...] = (),
    ) -> None:
        self._config, self._client, self._recovery_timeout_s = config, client, recovery_timeout_s
        launcher = launcher or LauncherRequests()
        self._model = ServedModel(
            model_names, info, int(time.time()), forms or ChatForms(None), config.strict_fields,
            adapters=adapters,
        )  # fmt: skip
        self._every_route = routes()
        self._routes = {path: route for route in self._every_route for path in spellings(route.path)}
        self._access, self._hosts = Access(config), Hosts(config.host, config.allowed_hosts)
        self._cors, self._write_access = Cors(config.allowed_origins), writer_of(config.access_log)
        self._key_metrics = KeyMetrics(key.name for key in config.keys)
        self._operations = Operations(
            client, lambda: self.is_ready, self._load, launcher, self._metrics_of_keys,
            self._model.name, config.vllm_metric_names,
        )  # fmt: skip
        self._kill = KillRoute(lambda: client.workers, launcher.kill, self._read)
        self.lanes = LaneRoutes(
            lambda: client.workers, launcher.watch, self._access, lambda: self.is_retiring, tp_size
        )
        self._page = None if config.disable_page else Page(config, samples)
        self._spans = spans
        self._pace, self._budget = pace or BodyPace(), budget or Budget(memory_mib(config) * MIB)
        self._admission = Admission()
        self.is_ready = False
        self._is_settled = asyncio.Event()  # the pipeline is ready, or never will be
        self.is_retiring = False  # each connection ends with its next answer
        self.num_handled = 0  # requests being handled
        self.num_waiting = 0  # of them: waiting for the pipeline to be ready
        self.num_unfinished = 0  # of them: questions to the model
        self.handled_at = 0.0  # when the last request ended

    def set_ready(self) -> None:
        longest = self._client.welcome.max_model_len
        self._model = self._model._replace(max_model_len=longest, store=ResponseStore())
        self.is_ready = True
        self._is_settled.set()

    def give_up(self) -> None:
        """The pipeline has ended before it was ready: waiting requests fail."""
        self._is_settled.set()

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard])
        application.on_response_prepare.append(self._on_head)
        application.router.add_get(PATH, self._describe)
        application.add_routes(self._operations.routes(has_admin=bool(self._config.admin_key)))
        application.add_routes(self.lanes.routes())
        if self._access.has_admin:
            application.router.add_post(KILL, self._kill.handle)
        if self._page is not None:
            application.add_routes(self._page.routes())
        for route in self._every_route:
            for path in spellings(route.path):
                if issubclass(route, Endpoint):
                    application.router.add_post(path, partial(self._ask, route))
                else:
                    add = getattr(application.router, f"add_{route.method.lower()}")  # GET brings HEAD
                    add(path, partial(self._inquire, route))
        return application

    # Around every request.

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.num_handled += 1
        name = self._access.key_name(request)
        request[RECORD] = record = RequestRecord(request_id=request_id_of(request), key_name=name)
        trace = self._begin_trace(request)
        request[LEASE] = lease = BudgetLease(self._budget, self._access.tenant(request))
        try:
            response = await self._answer(request, handler)
            record.status = response.status
            return response
        finally:
            self._write_access(request, record)
            if self._is_question(request):
                self._key_metrics.count(record, time.monotonic())
            if trace is not None:
                trace.end(record)
            lease.close()
            self.num_handled -= 1
            self.handled_at = time.monotonic()

    def _is_question(self, request: web.Request) -> bool:
        """To the model."""
        return issubclass(self._routes.get(request.path, Route), Endpoint)

    def _begin_trace(self, request: web.Request) -> RequestTrace | None:
        """Of a question to the model, if it is to be traced."""
        if self._spans is None or not self._is_question(request):
            return None
        path = self._routes[request.path].path
        request[TRACE] = trace = RequestTrace(self._spans, request, path, self._model.name)
        return trace

    def _metrics_of_keys(self, request: web.Request) -> Collector:
        return self._key_metrics.collector(partial(self._access.may_see, request))

    async def _on_head(self, request: web.Request, response: web.StreamResponse) -> None:
        """Notes that an answer has begun, and adds the headers that all answers have. Closes the connection
        after it when the worker retires, or when a refused body has an unread rest, which would be parsed as
        the next request; also after CONNECT, behind whose head the parser knows no body.

        The head says so, or the client might send its next request on the connection.
        """
        request[BEGUN] = response
        varies = response.headers.getall("Vary", [])  # a file of the page has other bytes when it is packed
        response.headers.update(self._cors.headers(request))
        if varies:
            response.headers["Vary"] = ", ".join(dict.fromkeys((*varies, *response.headers.getall("Vary"))))
        for name in HEADERS:
            response.headers[name] = request[RECORD].request_id
        if self.is_retiring or not request.content.is_eof() or request.method == "CONNECT":
            response.force_close()
            response.headers["Connection"] = "close"  # the head is made before this hook

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks head and key, calls the handler, and turns errors into the route's error object: in the
        stream, if it has begun."""
        try:
            # Requests that are refused by their head alone come first: nothing of their body is read.
            self._hosts.check(request)
            if (preflight := self._cors.preflight(request)) is not None:
                return preflight
            refuse_body(request, self._config.max_request_mib)
            self._access.admit(request)
            if request.match_info.http_exception is None:
                refuse_type(request)
            if request.path not in UNCOUNTED_ROUTES and not is_page(request.path):
                await request[LEASE].grow(BASE_BYTES)
            return await handler(request)
        except asyncio.CancelledError:
            # The client has gone, or the server ends. In the second case a stream ends with an error.
            if request.get(BEGUN) is not None:
                await self._fail(request, ErrorInfo(503, "the server is shutting down"))
            raise
        except RequestError as error:
            return await self._fail(request, error.info)
        except web.HTTPException as error:
            served = (route.path for route in self._every_route if issubclass(route, Endpoint))
            what = explain(error, request.method, request.path, served)
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
                request_id = request[RECORD].request_id
                logger.exception("%s %s failed, request_id=%s", request.method, request.path, request_id)
            return await self._fail(request, ErrorInfo(500, "the server made a mistake"))

    async def _fail(self, request: web.Request, error: ErrorInfo) -> web.StreamResponse:
        request[RECORD].failed_status = error.status
        route = self._routes.get(request.path, Route)
        begun: web.StreamResponse | None = request.get(BEGUN)
        if begun is None:
            return error_response(error, route.error_body(error))
        await end_stream(begun, route.last_words(error))
        return begun

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

    async def _describe(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.description, content_type="application/json")

    @functools.cached_property
    def description(self) -> bytes:
        """Of all routes, when it is first asked for."""
        names, config = self._model.every_name, self._config
        facts = ServerFacts(names, config.strict_fields, bool(config.keys), bool(config.admin_key))
        return msgspec.json.encode(document(self._every_route, facts))

    # The two kinds of routes.

    async def _inquire(self, route: type[Inquiry], request: web.Request) -> web.StreamResponse:
        await self._until_ready()
        inquiry = route(self._model)
        inquiry.tenant = self._access.tenant(request)
        return _json_response(inquiry.render(**request.match_info))

    async def _ask(self, route: type[Endpoint], request: web.Request) -> web.StreamResponse:
        """Counts a request to the model while it is unfinished, or refuses it if there are too many."""
        most = self._config.max_queued_requests
        if most is not None and self.num_unfinished >= most:
            what = f"{self.num_unfinished} requests are unfinished, more are not taken now"
            raise RequestError(what, status=429)
        self.num_unfinished += 1
        try:
            return await self._generate(route, request)
        finally:
            self.num_unfinished -= 1

    def _load(self) -> Load:
        return Load(self.num_unfinished, self.num_waiting)

    async def _generate(self, route: type[Endpoint], request: web.Request) -> web.StreamResponse:
        await self._until_ready()
        endpoint = route(self._model)
        endpoint.tenant = tenant = self._access.tenant(request)
        submission = await self._decode(request, endpoint)
        salt = self._access.cache_salt(request, submission.cache_salt)
        trace: RequestTrace | None = request.get(TRACE)
        if trace is not None:
            trace.asks(submission.sampling, submission.is_streamed)
        record = request[RECORD]
        generation = Generation(
            self._client, submission, self._model.forms, salt, tenant, trace, record.on_first_token
        )
        record.answer, record.completion_id = generation.answer, submission.request_id
        request_ids = [submission.id_of(number) for number in range(len(submission.prompts))]
        with self.lanes.owned(request_ids, tenant):
            if submission.is_streamed:
                return await self._stream(request, endpoint, generation)
            answer = endpoint.render(await generation.whole())
        return _json_response(answer, _warning(endpoint.ignored_fields))

    async def _read(self, request: web.Request) -> bytearray:
        return await read_body(request, request[LEASE], self._pace, self._config.max_request_mib)

    async def _decode(self, request: web.Request, endpoint: Endpoint) -> Submission:
        """Reads and decodes the body. The body is freed on return: only the submission holds the media."""
        lease = request[LEASE]
        body = await self._read(request)
        # To decode, render and submit a request is the longest work of this loop.
        await self._admission.wait()
        endpoint.reserve = lease.add
        try:
            submission = endpoint.decode(body)
        except RecursionError:  # of JSON in a text, which is parsed and written again
            raise RequestError("the body, or JSON in it, is nested too deep") from None
        lease.keep(submission.media)
        if endpoint.ignored_fields:
            logger.info("%s: ignored %s", request.path, _named(endpoint.ignored_fields))
        return submission

    async def _stream(
        self, request: web.Request, endpoint: Endpoint, generation: Generation
    ) -> web.StreamResponse:
        async with aclosing(generation.updates()) as updates:
            # The status is sent with the first token, so that a broken picture is a 4xx also when streaming.
            first = await anext(updates)
            headers = {**STREAM_HEADERS, **_warning(endpoint.ignored_fields)}
            response = web.StreamResponse(headers=headers)
            request[RECORD].streamed_at = time.monotonic()
            await response.prepare(request)
            async for data in endpoint.stream(generation.answer, _chain(first, updates)):
                await response.write(data)
            return response


def _json_response(answer: Json, headers: Mapping[str, str] | None = None) -> web.Response:
    """msgspec writes the log-probabilities of a long answer five times as fast as Python's encoder."""
    body = msgspec.json.encode(answer)
    return web.Response(body=body, content_type="application/json", charset="utf-8", headers=headers)


def _named(fields: Sequence[str]) -> str:
    """Some names of fields, in ASCII whatever the client wrote."""
    return ", ".join(ascii(name[:MAX_SHOWN_NAME]) for name in fields[:MAX_SHOWN_NAMES])


def _warning(ignored: Sequence[str]) -> dict[str, str]:
    """The header that tells a client which fields of its body were ignored: RFC 7234, 5.5."""
    if not ignored:
        return {}
    quotable = _named(ignored).replace("\\", "?").replace('"', "?")
    return {"Warning": f'299 - "ignored fields: {quotable}"'}


async def _chain(first: Update, rest: AsyncIterator[Update]) -> AsyncIterator[Update]:
    yield first
    async for update in rest:
        yield update
