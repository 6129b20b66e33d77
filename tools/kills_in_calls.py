"""`kill -9` in the midst of tool calls under a grammar: what arrives must be the JSON of a run without kills.

    python -m tools.kills_in_calls --kills 30
    python -m tools.kills_in_calls --kills 10 --tp 2     # other options go to the launcher

A function with nested arguments is called by force, over HTTP and streamed; greedy, and sampled with a seed.
Each request is asked for once undisturbed. Then the LLM's rank 0 dies behind a random event of the stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from typing import Any, NamedTuple

import aiohttp
import jsonschema

from tools.bench_recovery import QUIET_S
from tools.bench_serving import open_session
from tools.processes import workers_of
from tools.soak import pipeline

PARAMETERS = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "shapes": {
            "type": "array",
            "minItems": 4,
            "maxItems": 8,
            "items": {
                "type": "object",
                "properties": {
                    "kind": {"enum": ["circle", "square", "star"]},
                    "size": {"type": "number", "minimum": 0, "maximum": 100},
                    "is_filled": {"type": "boolean"},
                },
                "required": ["kind", "size", "is_filled"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "shapes"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "draw", "parameters": PARAMETERS, "strict": True}}
SAMPLINGS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.8, "seed": 7})


class ToolCall(NamedTuple):
    name: str
    arguments: str
    finish_reason: str
    num_events: int


async def call(
    session: aiohttp.ClientSession, url: str, sampling: dict[str, Any], kill_behind: int = 0, llm: int = 0
) -> ToolCall:
    """`url` ends in /v1. Kills the process `llm` behind the event with this number."""
    body = {
        "messages": [{"role": "user", "content": "Draw what you like."}], "tools": [TOOL],
        "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 1500, "stream": True,
        **sampling,
    }  # fmt: skip
    name = arguments = finish_reason = ""
    num_events = 0
    async with session.post(f"{url}/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            num_events += 1
            if num_events == kill_behind:
                os.kill(llm, signal.SIGKILL)
            (choice,) = event["choices"]
            finish_reason = choice["finish_reason"] or finish_reason
            for delta in choice["delta"].get("tool_calls") or ():
                assert delta["index"] == 0
                name += delta["function"].get("name") or ""
                arguments += delta["function"].get("arguments") or ""
    return ToolCall(name, arguments, finish_reason, num_events)


async def kill_in_calls(
    launcher: int, url: str, num_kills: int, rest_s: float, rng: random.Random
) -> Counter[str]:
    """What came of the kills. `rest_s`: between two, as a successor that dies at once is held back."""
    found: Counter[str] = Counter()
    async with open_session() as session:
        whole = [await call(session, url, sampling) for sampling in SAMPLINGS]
        for one in whole:
            assert (one.name, one.finish_reason) == ("draw", "tool_calls"), one
            jsonschema.validate(json.loads(one.arguments), PARAMETERS)
        for number in range(num_kills):
            which = number % len(SAMPLINGS)
            await asyncio.sleep(rest_s)
            behind = rng.randint(1, whole[which].num_events - 1)
            llm = workers_of(launcher)["llm.0"]
            got = await call(session, url, SAMPLINGS[which], behind, llm)
            is_same = got[:3] == whole[which][:3]
            found["equal" if is_same else "different"] += 1
            if not is_same:
                print(f"killed behind event {behind}:\n{got}\ninstead of\n{whole[which]}", file=sys.stderr)
            found["died"] += workers_of(launcher).get("llm.0") != llm
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args, options = parser.parse_known_args()
    with pipeline(["--dtype", "float32", *options]) as served:
        work = kill_in_calls(served.process.pid, served.url, args.kills, QUIET_S, random.Random(args.seed))
        found = asyncio.run(work)
    print(f"{args.kills} kills in tool calls: {found['died']} died, {found['equal']} answers equal")
    return int(found["different"] > 0 or found["died"] < args.kills)


if __name__ == "__main__":
    sys.exit(main())
