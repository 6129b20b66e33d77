"""How many ViTs, decoding processes and LLM groups a load needs: the pipeline in simulated time.

    python -m tools.simulate --measure stages.json                        # this machine's stage times
    python -m tools.simulate --stages stages.json --rate 4 --images 1     # what a load would feel
    python -m tools.simulate --shape qwen3-vl-8b --flops 990e12 --bytes-per-s 3.3e12 --rate 20 --images 1 \\
        --image-size 1024x1024 --text-tokens 200 --output-tokens 200 --ttft 1 --itl 0.05 --plot found.svg
    python -m tools.simulate --check                                      # beside measured loads, here

The third line takes a roofline of a GPU in the place of measured times, and searches the fewest processes
whose P99s meet the goals. `--measure` and `--check` start servers of their own; options not known here go to
these.
docs/simulator.md says what is simulated and what is not.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from launcher.checkpoints import EMBEDDED
from pipeline.families import ModelInfo, read_model_info
from tools.bench_serving import parse_sizes
from tools.plots import Bar, bars, height_of_bars, page
from tools.random_checkpoint.settings import write_settings
from tools.random_checkpoint.shapes import SHAPES
from tools.simulation.load import Camera, Load, Shape, random_load, read_trace
from tools.simulation.pipeline import Settings, Simulated, Size, simulate
from tools.simulation.report import ROWS, Summary, draw, summarize, table
from tools.simulation.search import MOST, Found, Goals, search
from tools.simulation.stages import SHARINGS, Machine, StageTimes, read_stages, roofline, write_stages


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """And the options that are not known here. Exits where these go to no server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, default=EMBEDDED / "model", help="folder of a checkpoint")
    model.add_argument("--shape", choices=SHAPES, help="a published model's shape, without its checkpoint")
    parser.add_argument("--max-pixels", type=int, help="as the server's option of this name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-requests", type=int, help="(default: 200; 24 with --measure and --check)")
    parser.add_argument("--plot", type=Path, help="SVG to write")
    _add_times(parser)
    _add_load(parser)
    size = parser.add_argument_group("what is simulated, or searched for with a goal")
    size.add_argument("--vits", type=int, default=1)
    size.add_argument(
        "--readers", type=int, default=4, help="processes of preprocessing that decode pictures"
    )
    size.add_argument("--groups", type=int, default=1, help="LLM groups")
    size.add_argument("--ttft", type=float, help="goal for the P99, in seconds")
    size.add_argument("--itl", type=float, help="goal for the P99, in seconds")
    size.add_argument("--most", type=int, default=MOST, help="processes of a kind")
    server = parser.add_argument_group("the server's options")
    for name, value in Settings._field_defaults.items():
        if isinstance(value, bool):
            flag = argparse.BooleanOptionalAction
            server.add_argument(f"--{name.replace('_', '-')}", action=flag, default=value)
        else:
            server.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args, others = parser.parse_known_args(arguments)
    if others and args.measure is None and not args.check:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.measure is None and not args.check and (args.stages is None) == (args.flops is None):
        parser.error("give either --stages FILE or a roofline, --flops and --bytes-per-s")
    if (args.flops is None) != (args.bytes_per_s is None):
        parser.error("a roofline needs both --flops and --bytes-per-s")
    return args, others


def _add_times(parser: argparse.ArgumentParser) -> None:
    times = parser.add_argument_group("stage times")
    times.add_argument("--measure", type=Path, metavar="FILE", help="measure here, and write them")
    times.add_argument("--check", action="store_true", help="measure here, and predict other loads")
    times.add_argument("--stages", type=Path, metavar="FILE", help="as --measure has written them")
    times.add_argument("--flops", type=float, help="roofline: operations/s of a GPU")
    times.add_argument("--bytes-per-s", type=float, help="roofline: of its memory")
    times.add_argument("--efficiency", type=float, default=0.6, help="which part of both is reached")
    times.add_argument("--weight-bytes", type=float, default=2.0, help="of a weight")
    times.add_argument("--kv-cache-gib", type=float, default=32.0, help="of each rank")
    times.add_argument("--tp", type=int, default=1, help="roofline: ranks of a group")
    times.add_argument("--sharing", choices=SHARINGS, help="in the place of what the stage times say")


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("the load")
    load.add_argument("--trace", type=Path, help="file with a request a line, see docs/simulator.md")
    load.add_argument("--rate", type=float, default=0.0, help="open loop: requests a second (Poisson)")
    load.add_argument("--concurrency", type=int, default=0, help="closed loop: requests at a time")
    load.add_argument("--text-tokens", type=int, default=64)
    load.add_argument("--output-tokens", type=int, default=64)
    load.add_argument("--images", type=int, default=0, help="pictures of a request")
    load.add_argument("--image-size", default="448x448", help="one or several, WIDTHxHEIGHT,…")
    load.add_argument("--num-shared-images", type=int, default=0, help="pictures are drawn from so many")
    load.add_argument("--shared-tokens", type=int, default=0, help="first tokens that all requests share")
    load.add_argument("--share-with-images", type=float, default=1.0, help="of the requests")


def make_load(args: argparse.Namespace, camera: Camera) -> Load:
    if args.trace is not None:
        return read_trace(args.trace, camera)
    shape = Shape(
        args.num_requests or 200, args.text_tokens, args.output_tokens, parse_sizes(args.image_size),
        args.images, args.num_shared_images, args.shared_tokens, args.share_with_images,
    )  # fmt: skip
    return random_load(shape, camera, random.Random(args.seed), args.rate, args.concurrency)


def make_stages(args: argparse.Namespace, info: ModelInfo) -> StageTimes:
    if args.stages is not None:
        stages = read_stages(args.stages)
    else:
        from tools.runners import num_paged_layers, num_weights  # which imports torch

        machine = Machine(
            flops=args.flops, bytes_per_s=args.bytes_per_s, efficiency=args.efficiency,
            weight_bytes=args.weight_bytes, kv_gib=args.kv_cache_gib,
        )  # fmt: skip
        stages = roofline(info, num_weights(info.text), num_paged_layers(info.text), machine, args.tp)
    return msgspec.structs.replace(stages, sharing=args.sharing) if args.sharing else stages


def read_info(args: argparse.Namespace) -> ModelInfo:
    if args.shape is None:
        return read_model_info(args.model, None, args.max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        write_settings(Path(folder), SHAPES[args.shape])
        return read_model_info(Path(folder), None, args.max_pixels)


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(*(getattr(args, name) for name in Settings._fields))


def show(simulated: Simulated, plot: Path | None) -> None:
    print(table(summarize(simulated), simulated))
    if plot is not None:
        plot.write_text(draw({"simulated": simulated.outcomes}, simulated.stages, simulated.wall))


def find(
    args: argparse.Namespace, stages: StageTimes, info: ModelInfo, load: Load, goals: Goals
) -> Simulated | None:
    """Searches, and tells what was tried and found; None: nothing meets the goals."""

    met: dict[Size, Simulated] = {}

    def run(size: Size) -> Summary:
        simulated = simulate(stages, info, size, settings_of(args), load)
        summary = summarize(simulated)
        if goals.are_met(summary):
            met[size] = simulated
        return summary

    found = search(run, goals, args.most)
    print("groups  ViTs  readers   TTFT P99, ms   ITL P99, ms")
    for size, summary in found.tried:
        mark = "meets the goals" if goals.are_met(summary) else ""
        print(
            f"{size.num_groups:6d} {size.num_vits:5d} {size.num_readers:8d} {1000 * summary.ttft_p99:14.1f} "
            f"{1000 * summary.itl_p99:13.1f}   {mark}".rstrip()
        )
    if found.size is None:
        print(f"No number of processes up to {args.most} of a kind meets the goals.")
        if args.plot is not None:
            args.plot.write_text(draw_search(found))
        return None
    size = found.size
    print(
        f"needed: {size.num_groups} LLM groups, {size.num_vits} ViTs, {size.num_readers} readers of pictures"
    )
    return met[size]


def draw_search(found: Found) -> str:
    """An SVG: TTFT and ITL of each size that was tried."""
    names = [
        f"{one.num_groups} groups, {one.num_vits} ViTs, {one.num_readers} readers" for one, _ in found.tried
    ]
    drawn: list[str] = []
    for panel, key in enumerate(("ttft_p99", "itl_p99")):
        name, factor = ROWS[key]
        values = [
            Bar(words, value, value, value)
            for words, (_, summary) in zip(names, found.tried, strict=True)
            for value in [factor * getattr(summary, key)]
        ]
        drawn += bars(name, values, 10 + 620 * panel, 10, 600, 220)
    return page(1250, 20 + height_of_bars(len(names)), drawn)


def check_here(args: argparse.Namespace, info: ModelInfo, options: Sequence[str], count: int) -> None:
    from tools.simulation.measure import check  # which imports torch and transformers

    stages, compared = check(args.model, info, options, count, args.seed)
    print(msgspec.json.format(msgspec.json.encode(stages), indent=2).decode())
    print("| load | | measured | predicted | predicted / measured |")
    print("| --- | --- | --- | --- | --- |")
    for one in compared:
        role = "fitted" if one.is_fitted else "unseen"
        for key, (name, factor) in ROWS.items():
            measured, predicted = getattr(one.measured, key), getattr(one.predicted, key)
            print(
                f"| {one.run.name} ({role}) | {name} | {measured * factor:.1f} | {predicted * factor:.1f} | "
                f"{predicted / measured:.2f} |"
            )
    if args.plot is not None:
        last = compared[-1]
        runs = {"measured": last.run.outcomes, "simulated": last.simulated.outcomes}
        args.plot.write_text(draw(runs, last.simulated.stages, last.simulated.wall))


def main() -> None:
    args, options = parse_arguments()
    info = read_info(args)
    count = args.num_requests or 24  # of each load
    if args.max_pixels is not None:
        options += ["--max-pixels", str(args.max_pixels)]
    if args.check:
        check_here(args, info, options, count)
        return
    if args.measure is not None:
        from tools.simulation.measure import measure  # which imports torch and transformers

        write_stages(args.measure, measure(args.model, info, options, count, args.seed).stages)
        print(args.measure.read_text(), end="")
        return
    try:
        stages, load = make_stages(args, info), make_load(args, Camera(info))
        simulated: Simulated | None
        if args.ttft is not None or args.itl is not None:
            given = {"ttft": args.ttft, "itl": args.itl}
            goals = Goals(**{name: value for name, value in given.items() if value is not None})
            simulated = find(args, stages, info, load, goals)
        else:
            size = Size(args.vits, args.readers, args.groups)
            simulated = simulate(stages, info, size, settings_of(args), load)
    except (ValueError, OSError) as error:
        raise SystemExit(f"simulate: {error}") from None
    if simulated is None:
        raise SystemExit(1)
    show(simulated, args.plot)


if __name__ == "__main__":
    main()
