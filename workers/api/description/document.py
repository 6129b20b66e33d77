"""The OpenAPI document of the server's routes, made of their structs: `/openapi.json`.

routes -> structs -> msgspec's schemas -> what decoding takes beyond them -> paths
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec

from workers.api.description.answers import Error, Killed, Readiness, Reloading, ServerLoad, Version
from workers.api.description.forms import FORMS, LIMITS, SPOKEN_TO
from workers.api.description.schemas import EMPTY, NULL, REFERENCE, SHARED, UNSET
from workers.api.endpoints.base import Endpoint, Inquiry
from workers.api.errors import error_headers
from workers.api.json_bodies import field_kinds
from workers.api.kill import KILL, KillBody
from workers.api.operations import ADMIN_ROUTES, LANES, OPEN_ROUTES, version
from workers.api.unserved_fields import NEUTRAL

Json = dict[str, Any]
PATH = "/openapi.json"
JSON, STREAM, TEXT = "application/json", "text/event-stream", "text/plain"
DESCRIPTION = """What this server takes and gives. `/v1` may be left out of every path.

A body that fits its schema may be refused with 400 all the same: for what fields say together, for the length
of the context, for media and schemas that cannot be read. Another method than those told here is a 405 with
`Allow`. Where GET is served, HEAD is. An answer is `text/event-stream` if the body has `stream: true`."""
WITH_KEY = (401, 403)
WITH_BODY = (400, 404, 408, 413, 415, 417, 429, 503)  # 404: the model


class ServerFacts(NamedTuple):
    model_names: tuple[str, ...]
    is_strict: bool  # unknown fields are refused
    has_keys: bool
    has_admin: bool


def document(routes: Sequence[type[Endpoint] | type[Inquiry]], facts: ServerFacts) -> Json:
    paths: dict[str, Json] = {}
    for route in routes:
        told = _endpoint(route) if issubclass(route, Endpoint) else _inquiry(route)
        paths.setdefault(plain_path(route.path), {})[route.method.lower()] = told
    for path, operation in _operations(facts.has_admin).items():
        paths.setdefault(path, {}).update(operation)
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": "vlm-pipeline", "version": version(), "description": DESCRIPTION},
        "paths": paths,
        "components": {"schemas": _schemas(routes, facts)},
    }
    if facts.has_keys:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
        found["security"] = [{"bearer": []}, {"x-api-key": []}]
    return found


def plain_path(path: str) -> str:
    """Without the patterns of the places."""
    return path.replace("{name:.+}", "{name}")


# Operations.


def _endpoint(route: type[Endpoint]) -> Json:
    answer = {JSON: {"schema": _named(route.answer)}, **({STREAM: {}} if route.streams else {})}
    body = {"required": True, "content": {JSON: {"schema": _named(route.fields)}}}
    statuses = _errors((*WITH_KEY, *WITH_BODY), route.error)
    return {**_head(route), "requestBody": body, "responses": {"200": _response(200, answer), **statuses}}


def _inquiry(route: type[Inquiry]) -> Json:
    has_place = "{" in route.path
    statuses = (*WITH_KEY, *((404,) if has_place else ()), 503)
    if route.answer is Error:  # there is nothing that it could do
        return {**_head(route), "responses": _errors((400, *statuses), Error)}
    answer = {JSON: {"schema": _named(route.answer)}}
    return {**_head(route), "responses": {"200": _response(200, answer), **_errors(statuses, Error)}}


def _head(route: type[Endpoint] | type[Inquiry]) -> Json:
    place = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {"operationId": route.__name__, **({"parameters": [place]} if "{" in route.path else {})}


def _operations(has_admin: bool) -> dict[str, Json]:
    """The operator's routes: operations.py."""
    found = {
        "/health": {"get": _operation({}, (503,))},
        "/ping": {"get": _operation({}, (503,))},
        "/ready": {"get": _operation({JSON: {"schema": _named(Readiness)}})},
        "/load": {"get": _operation({JSON: {"schema": _named(ServerLoad)}}, WITH_KEY)},
        "/version": {"get": _operation({JSON: {"schema": _named(Version)}}, WITH_KEY)},
        "/metrics": {"get": _operation({TEXT: {"schema": {"type": "string"}}}, WITH_KEY)},
        LANES: {"get": _operation({STREAM: {}}, (*WITH_KEY, 429))},
        PATH: {"get": _operation({JSON: {"schema": {"type": "object"}}}, WITH_KEY)},
    }
    not_ready = _response(503, {JSON: {"schema": _named(Readiness)}})
    found["/ready"]["get"]["responses"]["503"] = not_ready
    for path in OPEN_ROUTES:
        found[path]["get"]["security"] = []
    if has_admin:
        begun = {"202": _response(202, {JSON: {"schema": _named(Reloading)}})}
        told = {"responses": {**begun, **_errors((401, 403, 409, 503), Error)}}
        found[f"{ADMIN_ROUTES}reload"] = {"post": told}
        killed = {"202": _response(202, {JSON: {"schema": _named(Killed)}})}
        found[KILL] = {
            "post": {
                "requestBody": {"required": True, "content": {JSON: {"schema": _named(KillBody)}}},
                "responses": {**killed, **_errors((*WITH_KEY, 409, *WITH_BODY), Error)},
            }
        }
    return found


def _operation(answer: Json, statuses: Iterable[int] = ()) -> Json:
    return {"responses": {"200": _response(200, answer), **_errors(statuses, Error)}}


def _errors(statuses: Iterable[int], kind: type[msgspec.Struct]) -> Json:
    content = {JSON: {"schema": _named(kind)}}
    return {str(status): _response(status, content) for status in sorted(statuses)}


def _response(status: int, content: Json) -> Json:
    headers = {name: {"schema": {"type": "string"}} for name in error_headers(status)}
    told: Json = {"description": HTTPStatus(status).phrase, "content": content, "headers": headers}
    return {key: value for key, value in told.items() if value}


def _named(kind: type[msgspec.Struct]) -> Json:
    return {"$ref": REFERENCE.format(name=kind.__name__)}


# Schemas.


def _schemas(routes: Sequence[type[Endpoint] | type[Inquiry]], facts: ServerFacts) -> Json:
    of_bodies: dict[type[msgspec.Struct], list[type[Endpoint]]] = {}
    for route in routes:
        if issubclass(route, Endpoint):
            of_bodies.setdefault(route.fields, []).append(route)
    answers = {kind for route in routes for kind in (route.answer, route.error)}
    answers |= {Error, Readiness, Reloading, ServerLoad, Version, Killed, KillBody}
    _, made = msgspec.json.schema_components([*of_bodies, *answers], ref_template=REFERENCE)
    for kind in _structs(of_bodies):
        made[kind.__name__] = _taken(made[kind.__name__], kind, of_bodies.get(kind, ()), facts)
    return dict(sorted({**made, **SHARED}.items()))


def _structs(kinds: Iterable[type[msgspec.Struct]]) -> set[type[msgspec.Struct]]:
    """These, and the structs in their fields."""
    found, left = set[type[msgspec.Struct]](), list(kinds)
    while left:
        if (kind := left.pop()) not in found:
            found.add(kind)
            left += [inner for one in field_kinds(kind).values() if (inner := one.struct) is not None]
    return found


def _taken(
    schema: Json, kind: type[msgspec.Struct], whose: Sequence[type[Endpoint]], facts: ServerFacts
) -> Json:
    """What decoding takes for a struct beyond its types: see json_bodies.py and unserved_fields.py.

    `whose`: the routes of which it is the body.
    """
    forms: dict[str, Json] = {}
    for base in reversed(kind.__mro__):
        forms |= FORMS.get(base, {})
    for route in whose:
        forms |= route.forms
    properties = {}
    for name, made in schema["properties"].items():
        told = _limited(forms.get(name, made), LIMITS.get(name, {}))
        properties[name] = told if name in schema["required"] else _or_null(told)
    if whose:
        properties["model"] = {"enum": [None, "", *facts.model_names]}
        for name, neutral in NEUTRAL.items():
            properties.setdefault(name, {"enum": [*EMPTY, *neutral]})
    others = UNSET if facts.is_strict else True
    return {
        **schema,
        "properties": properties,
        "additionalProperties": others,
        **(whose[0].form if whose else {}),
    }


def _limited(schema: Json, limits: Mapping[str, Any]) -> Json:
    if "anyOf" in schema:
        return {**schema, "anyOf": [_limited(one, limits) for one in schema["anyOf"]]}
    kind = schema.get("type")
    return {**schema, **{key: value for key, value in limits.items() if kind in SPOKEN_TO[key]}}


def _or_null(schema: Json) -> Json:
    """Null is a field left out."""
    schema = {key: value for key, value in schema.items() if key != "default" or value is not None}
    is_any = not schema.keys() - {"default"}
    if is_any or NULL in schema.get("anyOf", ()) or None in schema.get("enum", ()):
        return schema
    default = {key: schema.pop(key) for key in ("default",) if key in schema}
    return {"anyOf": [schema, NULL], **default}
