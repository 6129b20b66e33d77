"""instructor: an object of a pydantic class by each of its modes for such a server."""

from __future__ import annotations

import asyncio
from typing import Any

import checks
import instructor
import openai
from instructor.core import InstructorRetryException
from instructor.processing.multimodal import Image

OPTIONS: dict[str, Any] = {"base_url": checks.URL, "api_key": checks.KEY, "max_retries": 0, "timeout": 60}
PICTURE: Any = [{"role": "user", "content": [checks.QUESTION, Image.from_path(checks.PICTURE)]}]
FIELDS: dict[str, Any] = {"model": checks.MODEL, "max_retries": 0}


def by(mode: str) -> Any:
    return instructor.from_openai(openai.OpenAI(**OPTIONS), mode=getattr(instructor.Mode, mode))


def ask(mode: str, kind: Any = checks.Shape, **fields: Any) -> Any:
    created = by(mode).chat.completions.create
    made = created(response_model=kind, messages=PICTURE, max_tokens=300, **FIELDS, **fields)
    assert isinstance(made, kind), made
    return made


def check_tools() -> None:
    ask("TOOLS")


def check_tools_strict() -> None:
    ask("TOOLS_STRICT")


def check_json() -> None:
    ask("JSON", checks.Anything, logit_bias=checks.EMPTY_OBJECT)


def check_json_schema() -> None:
    ask("JSON_SCHEMA")


def check_md_json() -> None:
    """Which asks for JSON by words only: the one choice makes the model write the block of Markdown."""
    block = '```json\n{"colour": "red", "corners": 5}\n```'
    ask("MD_JSON", extra_body={"structured_outputs": {"choice": [block]}})


def check_responses_tools() -> None:
    mode = instructor.Mode.RESPONSES_TOOLS
    client = instructor.from_openai(openai.OpenAI(**OPTIONS), mode=mode)
    made = client.responses.create(
        response_model=checks.Shape, input="A shape?", max_output_tokens=300, **FIELDS
    )
    assert isinstance(made, checks.Shape)


def check_provider() -> None:
    client = instructor.from_provider(f"openai/{checks.MODEL}", base_url=checks.URL, api_key=checks.KEY)
    made = client.create(response_model=checks.Shape, messages=PICTURE, max_tokens=300, max_retries=0)
    assert isinstance(made, checks.Shape)


def check_partial() -> None:
    client = by("TOOLS").chat.completions
    pieces = list(
        client.create_partial(response_model=checks.Shape, messages=PICTURE, max_tokens=300, **FIELDS)
    )
    checks.Shape.model_validate(pieces[-1].model_dump())


async def check_async() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(**OPTIONS), mode=instructor.Mode.JSON_SCHEMA)
    asked = client.chat.completions.create(
        response_model=checks.Shape, messages=PICTURE, max_tokens=300, **FIELDS
    )
    assert isinstance(await asyncio.wait_for(asked, 60), checks.Shape)


def check_overflow() -> None:
    try:
        by("TOOLS").chat.completions.create(
            response_model=checks.Shape, messages=[{"role": "user", "content": checks.TOO_LONG}], **FIELDS
        )
    except (InstructorRetryException, openai.BadRequestError) as error:
        assert "maximum context length" in str(error)
        return
    raise AssertionError("taken")


if __name__ == "__main__":
    checks.run(globals())
