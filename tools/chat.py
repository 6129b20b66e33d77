"""Asks a running server one question, with pictures and videos if you like, and streams the answer.

python -m tools.chat "What is in this picture?" --image launcher/embedded/samples/red-star.png
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import mimetypes
import sys
from pathlib import Path

import aiohttp


def medium(kind: str, place: str) -> dict[str, object]:
    """A content part, `image_url` or `video_url`: a local file is sent along, a URL fetched by the server."""
    if "://" not in place and not place.startswith("data:"):
        content_type = mimetypes.guess_type(place)[0] or "application/octet-stream"
        place = f"data:{content_type};base64,{base64.b64encode(Path(place).read_bytes()).decode()}"
    return {"type": kind, kind: {"url": place}}


def _media(args: argparse.Namespace) -> tuple[tuple[str, list[str]], ...]:
    return (("image_url", args.image), ("video_url", args.video))


async def ask(args: argparse.Namespace) -> int:
    media = [medium(kind, place) for kind, places in _media(args) for place in places]
    parts = [*media, {"type": "text", "text": args.question}]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    body: dict[str, object] = {"messages": [*messages, {"role": "user", "content": parts}], "stream": True}
    for name in ("model", "max_tokens", "temperature", "seed"):
        if (value := getattr(args, name)) is not None:
            body[name] = value
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{args.url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        if response.status != 200:
            error = (await response.json(content_type=None))["error"]
            print(f"{response.status}: {error['message']}", file=sys.stderr)
            return 1
        async for line in response.content:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                print(f"\n{event['error']['message']}", file=sys.stderr)
                return 1
            print(
                "".join(choice["delta"].get("content", "") for choice in event["choices"]), end="", flush=True
            )
    print()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument(
        "--image", action="append", default=[], help="file or URL of a picture; may be given several times"
    )
    parser.add_argument(
        "--video", action="append", default=[], help="file or URL of a video; may be given several times"
    )
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--model", help="the model's name, or an adapter's")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    try:
        return asyncio.run(ask(parser.parse_args()))
    except (aiohttp.ClientError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
