"""Holds what a server of the tests answers against its own description, `/openapi.json`."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import msgspec
from aiohttp import web

from workers.api.description.document import plain_path
from workers.api.page.routes import is_page
from workers.api.server import ApiServer

UNTOLD = (404, 405, 500)  # of no route, or a mistake that a test makes the server make


class Conformance:
    """`check` is called for each answer before it is sent. A stream has no body yet, and is not read."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self.violations: list[str] = []

    @functools.cached_property
    def _document(self) -> Any:
        return msgspec.json.decode(self._server.description)

    async def check(self, request: web.Request, response: web.StreamResponse) -> None:
        resource = request.match_info.route.resource
        if resource is None or request.method not in ("GET", "POST", "DELETE"):
            return
        if is_page(resource.canonical):  # files for browsers, no part of the API
            return
        path, paths = plain_path(resource.canonical), self._document["paths"]
        operations = paths.get(path) or paths[f"/v1{path}"]
        if request.method.lower() not in operations:
            return
        told = operations[request.method.lower()]["responses"].get(str(response.status))
        if told is None:
            if response.status not in UNTOLD:
                self.violations.append(f"{request.method} {path}: {response.status} is not described")
            return
        content = told.get("content", {})
        if content and response.content_type not in content:
            self.violations.append(f"{request.method} {path}: {response.content_type} is not described")
        schema = content.get("application/json", {}).get("schema")
        if (
            schema is None
            or not isinstance(response, web.Response)
            or response.content_type == "text/event-stream"
        ):
            return
        assert isinstance(response.body, bytes)
        whole = {**schema, "components": self._document["components"]}
        for error in jsonschema.Draft202012Validator(whole).iter_errors(json.loads(response.body)):
            self.violations.append(f"{request.method} {path}: {error.json_path}: {error.message[:300]}")
