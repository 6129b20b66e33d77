"""Submits one question straight over ZeroMQ, without HTTP, and streams the answer.

    python -m tools.submit --run-dir RUN_DIR "What is in this picture?" --image
    launcher/embedded/samples/red-star.png

The run directory is the one that the launcher names when it is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from pipeline.client.client import PipelineClient
from pipeline.wire.errors import PipelineError, RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from tools.places import add_place


async def submit(args: argparse.Namespace, media: list[bytes]) -> None:
    parts: tuple[ImagePart | TextPart, ...] = (
        *(ImagePart(frame=index) for index in range(len(media))),
        TextPart(args.question),
    )
    sampling = SamplingParams(temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens)
    client = PipelineClient(args.run_dir or args.url, args.keys, args.model_folder)
    await client.start(timeout_s=5)
    try:
        message = ChatMessage("user", parts)
        async for piece in client.generate([message], sampling, media, adapter=args.adapter):
            print(piece.text, end="", flush=True)
            if piece.finish_reason is not None:
                print(
                    f"\n[{piece.finish_reason}: {piece.num_prompt_tokens} prompt tokens, "
                    f"{piece.num_output_tokens} output tokens]"
                )
    finally:
        await client.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    add_place(parser)
    parser.add_argument(
        "--image", action="append", default=[], help="file of a picture; may be given several times"
    )
    parser.add_argument("--adapter", default="", help="a LoRA adapter of the server, by its name")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    try:
        args = parser.parse_args()
        asyncio.run(submit(args, [Path(place).read_bytes() for place in args.image]))
    except (RequestError, PipelineError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
