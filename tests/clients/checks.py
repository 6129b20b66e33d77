"""What the client programs share: where the server is, what they ask about, and the run of their checks.

A program is run by the virtual environment of the clients, with the server's URL as its only argument. Each
of its functions `check_NAME` is a check, which fails by raising. The program prints a line of JSON for each;
clients print other lines, too.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

ROOT = sys.argv[1] if len(sys.argv) > 1 else ""
URL = f"{ROOT}/v1"
MODEL = "embedded-shapes"
KEY = "none"
PICTURE = Path(__file__).parents[2] / "launcher" / "embedded" / "samples" / "red-star.png"
BASE64 = base64.b64encode(PICTURE.read_bytes()).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
QUESTION = "What shape is in the picture?"
TEXT_QUESTION = "What is a star?"
CITIES = ("Rome", "Oslo")
TOO_LONG = "hello " * 6000
# `logit_bias` for `{` and `}`: an object that ends at once. The model was never taught JSON, and would go on.
EMPTY_OBJECT = {"90": 100, "92": 100}

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "How the weather is in a city", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


class Shape(pydantic.BaseModel):
    """A shape in a picture."""

    colour: Literal["red", "blue"]
    corners: Literal[3, 5]


class Anything(pydantic.BaseModel):
    """An object with nothing that it must have."""


def red_star(text: str | None) -> None:
    assert text is not None
    assert "star" in text, text


def one_call(name: str, arguments: str | dict[str, Any]) -> None:
    read = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "weather", name
    assert list(read) == ["city"], read
    assert read["city"] in CITIES, read


def _run(function: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        made = function()
        if inspect.iscoroutine(made):
            asyncio.run(made)
        error = None
    except BaseException:  # noqa: BLE001 - whatever the client does is told
        error = traceback.format_exc()[-4000:]
    name = function.__name__.removeprefix("check_")
    return {"check": name, "error": error, "seconds": round(time.monotonic() - start, 2)}


def run(module: Mapping[str, Any]) -> None:
    for name, function in list(module.items()):
        if name.startswith("check_"):
            sys.stdout.write(json.dumps(_run(function)) + "\n")
            sys.stdout.flush()
