"""Answers a file of requests, OpenAI's batch format, straight over ZeroMQ.

    python -m tools.batch --run-dir RUN_DIR requests.jsonl answers.jsonl

Each line of the input has `custom_id`, `method`, `url` and `body`; each line of the output answers the line
of the input in the same place, with a status and a body, or with an error. What is there already is not asked
again: after a kill the same command goes on where it was. From another machine: `--url tcp://HOST:PORT --keys
FOLDER` instead of the run directory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from tqdm import tqdm

from pipeline.client.client import PipelineClient
from pipeline.families import read_model_info
from pipeline.parsers.forms import ChatForms
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from tools.places import add_place
from workers.api.endpoints.base import Endpoint, ServedModel
from workers.api.endpoints.registry import endpoints
from workers.api.errors import error_body
from workers.api.generation import Generation

RETRIES = 5  # of a request that an overloaded or recovering server refused
FIRST_PAUSE_S = 0.5
MOST_UNDER_WAY = 1024  # a lone tenant may have 1792 open (by default): what is beyond would be refused
MOST_AHEAD = 16  # times the requests under way: answers that wait for one before them


class Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw
    method: str = "POST"
    url: str = "/v1/chat/completions"


async def answer(client: PipelineClient, data: bytes, model: ServedModel) -> dict[str, Any]:
    """The output's line for a line of the input."""
    made: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": None,
        "response": None,
        "error": None,
    }
    try:
        line = msgspec.json.decode(data, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return {**made, "error": {"code": "invalid_line", "message": str(error)}}
    made["custom_id"] = line.custom_id
    served = endpoints()
    if line.method != "POST" or line.url not in served:
        what = f"only POST {', '.join(served)} is served, not {line.method} {line.url}"
        return {**made, "error": {"code": "invalid_url", "message": what}}
    for attempt in range(RETRIES + 1):
        try:
            response = await _complete(client, served[line.url](model), bytes(line.body))
            return {**made, "response": response}
        except RequestError as error:
            if error.info.status not in (429, 503) or attempt == RETRIES or client.failure:
                if client.failure:
                    raise PipelineError(client.failure) from None
                return {**made, "response": _failure(error.info)}
            await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


async def _complete(client: PipelineClient, endpoint: Endpoint, data: bytes) -> dict[str, Any]:
    submission = endpoint.decode(data)
    if submission.is_streamed:
        raise RequestError("a batch has no streams", field="stream")
    generation = Generation(client, submission, endpoint.model.forms)
    body = endpoint.render(await generation.whole())
    return {"status_code": 200, "request_id": submission.request_id, "body": body}


def _failure(error: ErrorInfo) -> dict[str, Any]:
    return {"status_code": error.status, "request_id": "", "body": error_body(error)}


def num_answered(path: Path) -> int:
    """Whole lines of an output; what a kill left of one is cut off."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        count = size = 0
        for line in file:
            if line.endswith(b"\n"):
                count, size = count + 1, size + len(line)
        file.truncate(size)
    return count


def lines_of(path: Path, skip: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            if number >= skip:
                yield line


async def run(args: argparse.Namespace) -> int:
    """Number of lines that were not answered with 200, of those answered now."""
    done = num_answered(args.output)
    total = sum(1 for _ in lines_of(args.input, 0))
    num_failed = 0
    async with PipelineClient(args.run_dir or args.url, args.keys, args.model_folder) as client:
        welcome = client.welcome
        info = read_model_info(client.model_folder)
        forms = ChatForms.read(info.folder, info.tool_call_parser, info.reasoning_parser)
        adapters = welcome.adapters
        model = ServedModel((welcome.model_name,), info, int(time.time()), forms, adapters=adapters)
        width = min(args.concurrency, welcome.max_requests, MOST_UNDER_WAY)
        with (
            args.output.open("ab") as output,
            tqdm(total=total, initial=done, unit="request", disable=None) as bar,
        ):
            under_way: list[asyncio.Task[dict[str, Any]]] = []
            for line in lines_of(args.input, done):
                under_way.append(asyncio.create_task(answer(client, line, model)))
                while sum(not task.done() for task in under_way) >= width:
                    await asyncio.wait(
                        [task for task in under_way if not task.done()], return_when=asyncio.FIRST_COMPLETED
                    )
                if len(under_way) >= MOST_AHEAD * width:  # all wait for the first
                    await asyncio.wait(under_way[:1])
                while under_way and under_way[0].done():
                    num_failed += _write(output, under_way.pop(0).result(), bar)
            for task in under_way:
                num_failed += _write(output, await task, bar)
    return num_failed


def _write(output: BinaryIO, line: dict[str, Any], bar: Any) -> bool:
    output.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    output.flush()
    os.fsync(output.fileno())
    bar.update()
    return line["response"] is None or line["response"]["status_code"] != 200


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    add_place(parser)
    parser.add_argument("--concurrency", type=int, default=64, help="requests under way at once")
    args = parser.parse_args()
    try:
        num_failed = asyncio.run(run(args))
    except (PipelineError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if num_failed:
        print(f"{num_failed} lines were answered with an error", file=sys.stderr)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
