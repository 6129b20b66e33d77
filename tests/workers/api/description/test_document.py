"""`/openapi.json`: a valid description, of all routes, that takes what the server takes.

Answers are held against it in all tests of the api (`conformance.py`); requests by schemathesis, in
`tests/integration/test_attacks.py`.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from pipeline.wire.errors import RequestError
from tests.workers.api import toys
from tests.workers.api.serving import endpoint, get, serving
from workers.api.description.document import ServerFacts, document, plain_path
from workers.api.description.forms import FORMS
from workers.api.endpoints.base import Endpoint
from workers.api.endpoints.registry import endpoints, routes
from workers.api.json_bodies import decode_fields
from workers.api.page.routes import is_page
from workers.api.unserved_fields import NEUTRAL, refuse_unserved

FACTS = ServerFacts(("m",), is_strict=False, has_keys=False, has_admin=True)
CHAT = [{"role": "user", "content": "Hi"}]
LEAST: dict[str, dict[str, Any]] = {  # a body without anything that may be left out
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/chat/completions/render": {"messages": CHAT},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


@functools.cache
def described(facts: ServerFacts = FACTS) -> Any:
    return msgspec.json.decode(msgspec.json.encode(document(routes(), facts)))


def fits(path: str, body: dict[str, Any], facts: ServerFacts = FACTS) -> bool:
    return bool(validator(path, facts).is_valid(body))


@functools.cache
def validator(path: str, facts: ServerFacts) -> Any:
    found = described(facts)
    schema = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator({**schema, "components": found["components"]})


def takes(path: str, body: dict[str, Any]) -> bool:
    try:
        _, unknown = decode_fields(json.dumps(body).encode(), endpoints()[path].fields)
        refuse_unserved(unknown)
    except RequestError:
        return False
    return True


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_document_is_valid(has_keys: bool) -> None:
    validate(described(FACTS._replace(has_keys=has_keys)), cls=OpenAPIV31SpecValidator)


async def test_the_document_has_every_route_and_no_other() -> None:
    server = endpoint(admin_key="secret")
    async with serving(server) as site:
        found = json.loads((await site.ask(get("/openapi.json"))).body)["paths"]
    told = {(method.upper(), path) for path, methods in found.items() for method in methods}
    served = {
        (route.method, plain_path(route.resource.canonical))
        for route in server.application().router.routes()
        if route.method != "HEAD" and route.resource is not None and not is_page(route.resource.canonical)
    }
    short = {(method, path.removeprefix("/v1")) for method, path in told}
    assert told <= served <= told | short


async def test_a_route_that_one_file_adds_is_described() -> None:
    with toys.installed():
        server = endpoint()
    async with serving(server) as site:
        found = json.loads((await site.ask(get("/openapi.json"))).body)
    assert "/toy/completions" in found["paths"]
    assert "budget" in found["components"]["schemas"]["ToyRequest"]["properties"]


async def test_the_description_names_the_models_so_it_needs_a_key() -> None:
    async with serving(endpoint(api_key=("secret",))) as site:
        assert (await site.ask(get("/openapi.json"))).status == 401
        answer = await site.ask(get("/openapi.json", "Authorization: Bearer secret"))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    found = json.loads(answer.body)
    assert found["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert found["paths"]["/health"]["get"]["security"] == []


def test_every_endpoint_has_a_body_here() -> None:
    assert LEAST.keys() == endpoints().keys()


@pytest.mark.parametrize("path", LEAST)
def test_null_is_a_field_left_out_and_a_whole_float_an_integer(path: str) -> None:
    least = LEAST[path]
    names = [field.encode_name for field in msgspec.structs.fields(endpoints()[path].fields)]
    nulls = {**dict.fromkeys(names), **least}
    assert fits(path, nulls)
    assert takes(path, nulls)
    if "seed" in names:
        assert fits(path, {**least, "seed": 2.0})
        assert takes(path, {**least, "seed": 2.0})
        assert not fits(path, {**least, "seed": 2.5})
        assert not takes(path, {**least, "seed": 2.5})


@pytest.mark.parametrize("path", LEAST)
def test_unknown_fields_are_taken_unless_they_are_known_elsewhere(path: str) -> None:
    least, strict = LEAST[path], FACTS._replace(is_strict=True)
    assert fits(path, {**least, "nobody_knows": 1})
    assert not fits(path, {**least, "nobody_knows": 1}, strict)
    assert fits(path, {**least, "nobody_knows": None}, strict)
    own = {field.encode_name for field in msgspec.structs.fields(endpoints()[path].fields)}
    for name, neutral in NEUTRAL.items():
        if name not in own:
            for value in (None, "", [], {}, *neutral):
                assert fits(path, {**least, name: value}), (name, value)
            assert not fits(path, {**least, name: "something"})


@pytest.mark.parametrize("path", LEAST)
def test_a_model_is_one_of_those_that_are_served(path: str) -> None:
    assert fits(path, {**LEAST[path], "model": "m"})
    assert not fits(path, {**LEAST[path], "model": "other"})


def test_the_forms_are_of_fields_that_there_are() -> None:
    for kind, forms in FORMS.items():
        assert forms.keys() <= {field.encode_name for field in msgspec.structs.fields(kind)}, kind


def test_every_status_of_an_endpoint_is_described_with_its_own_error() -> None:
    found = described()
    for route in routes():
        if issubclass(route, Endpoint):
            told = found["paths"][route.path]["post"]["responses"]
            assert {"200", "400", "401", "403", "404", "408", "413", "415", "429", "503"} <= told.keys()
            error = f"#/components/schemas/{route.error.__name__}"
            assert told["400"]["content"]["application/json"]["schema"] == {"$ref": error}
            assert "Retry-After" in told["429"]["headers"]
