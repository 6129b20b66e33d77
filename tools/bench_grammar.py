"""What a grammar costs: the time for a token with a JSON schema beside without, and compiling a schema.

    python -m tools.bench_grammar                       # 0.31 B parameters
    python -m tools.bench_grammar --shape 2b --streams 1 8 32

Weights are random. Rounds are interleaved and medians are told, since shared machines drift. All streams of a
run have the same prompt length and number of tokens, with a grammar and without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.client.client import PipelineClient
from pipeline.families import read_model_info
from pipeline.wire.prompts import ChatMessage
from pipeline.wire.sampling import Grammar, GrammarKind, SamplingParams
from tools.bench_engine import serve
from tools.random_checkpoint import SHAPES, make_checkpoint
from workers.grammars.vocabulary import GrammarVocabulary
from workers.preprocess.grammars import Grammars

KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string", "maxLength": 12},
    {"type": "number"},
    {"enum": ["circle", "square", "triangle"]},
    {"type": "array", "items": {"type": "string"}},
)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


ENDLESS = {
    "type": "array",
    "items": _object({f"field {number}": kind for number, kind in enumerate(KINDS)}),
    "minItems": 10_000,
}


def long_schema(num_lines: int) -> str:
    """A schema of so many lines, when it is indented."""
    properties: dict[str, Any] = {}
    while json.dumps(_object(properties), indent=1).count("\n") + 1 < num_lines:
        properties[f"field_{len(properties)}"] = KINDS[len(properties) % len(KINDS)]
    return json.dumps(_object(properties), indent=1)


async def token_seconds(
    client: PipelineClient, num_streams: int, grammar: Grammar | None, count: int
) -> float:
    """Seconds between two tokens of one of so many streams, from the first token of the last one on."""
    sampling = SamplingParams(max_tokens=count, ignore_eos=True, seed=1, temperature=0.7, grammar=grammar)
    times: list[list[float]] = [[] for _ in range(num_streams)]

    async def stream(number: int) -> None:
        async for _ in client.generate([ChatMessage("user", f"Tell me about {number}.")], sampling):
            times[number].append(time.perf_counter())

    await asyncio.gather(*(stream(number) for number in range(num_streams)))
    assert min(map(len, times)) > 1, "a stream is over after its first token"
    start, stop = max(each[0] for each in times), min(each[-1] for each in times)
    num_tokens = sum(start < moment <= stop for each in times for moment in each) / num_streams
    return (stop - start) / num_tokens


async def measure_tokens(run_dir: Path, streams: list[int], rounds: int, count: int) -> None:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(ENDLESS))
    async with PipelineClient(run_dir) as client:
        for num_streams in streams:
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for number in range(rounds + 1):
                for is_ruled in (False, True):
                    each = await token_seconds(client, num_streams, grammar if is_ruled else None, count)
                    if number:  # the first round warms up
                        seconds[is_ruled].append(each)
            free, ruled = (1e3 * statistics.median(seconds[is_ruled]) for is_ruled in (False, True))
            print(
                f"{num_streams:3d} streams: {ruled:8.2f} ms a token with a JSON schema, "
                f"{free:8.2f} ms without, ratio {ruled / free:.3f}"
            )


async def measure_compiling(folder: Path, num_lines: int) -> None:
    info = read_model_info(folder)
    grammars = Grammars(GrammarVocabulary(folder, info.text.vocab_size, info.eos_token_ids))
    try:
        await grammars.compile(Grammar(GrammarKind.REGEX, "a"))  # starts the process
        grammar = Grammar(GrammarKind.JSON_SCHEMA, long_schema(num_lines))
        seconds: list[float] = []
        for _ in range(6):
            started_at = time.perf_counter()
            data = await grammars.compile(grammar)
            seconds.append(time.perf_counter() - started_at)
    finally:
        await grammars.close()
    first, again = 1e3 * seconds[0], 1e3 * statistics.median(seconds[1:])
    print(
        f"a schema of {num_lines} lines: {first:.0f} ms to compile ({len(data) >> 10} KiB), "
        f"{again:.2f} ms again, ratio {again / first:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.3b", choices=SHAPES, help="of the random checkpoint")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--lines", type=int, default=200, help="of the schema that is compiled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, run_dir = Path(folder) / "model", Path(folder) / "run"
        make_checkpoint(model, options.shape)
        run_dir.mkdir(mode=0o700)
        asyncio.run(measure_compiling(model, options.lines))
        with serve(model, "--run-dir", str(run_dir)):
            asyncio.run(measure_tokens(run_dir, options.streams, options.rounds, options.output_tokens))


if __name__ == "__main__":
    main()
