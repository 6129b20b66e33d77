"""Ours beside other servers for the same checkpoint on this machine's CPU: a table and a plot.

    python -m tools.bench_peers --llama-server llama-server --vllm V/bin/python --openvino O/bin/python
    python -m tools.bench_peers --servers ours llama-bf16 --parts decode1 --rounds 5 --attention torch

Peers are installed by hand, each in a virtual environment of its own (docs/benchmarks.md); those that are not
found are left out and named. Options that are not known here go to our launcher.

A round starts each server in turn, alone, and ends it before the next: servers that only sleep would still
hold memory (four of a 2 B model do not fit into 24 GB) and their threads could wake, and a start is measured
each time. The order moves by one from round to round, so that no server is always behind the same. Medians
over the rounds are told. All servers have the same limits (tools/peers/adapters.py), requests and client;
ends of sequences are ignored.

prefill   tokens/s of a prompt of 512 tokens until its first token
decode1   tokens/s of one stream; decode8: of eight together
picture   seconds to the first token of a 448x448 picture with a short text, less those of as long a text
together  seconds for eight chats at once, each with a picture and an answer
Always: seconds from the command to the first answer; memory (PSS) after the parts, and the most that was seen
at the start and while eight pictures were answered for the first time.

A figure is refused, and taken again, where processes that are not the server's or ours, or the host, used
more than --max-others of the cores meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.families import read_model_info
from tools.peers.adapters import ROOT, Limits, LlamaCpp, OpenVino, Ours, Peer, TransformersServe, Vllm
from tools.peers.figures import Turn
from tools.peers.report import ROWS, Column, notes, plot, table
from tools.peers.turns import Plan, locked, take_turn
from tools.plots import shown
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.runners import kv_bytes, num_weights

PARTS = ("prefill", "decode1", "decode8", "picture", "together")


def all_peers(args: argparse.Namespace, options: Sequence[str]) -> list[Peer]:
    """Those that there are adapters for; ours first."""
    python = args.transformers
    llama = [LlamaCpp(args.llama_server, args.llama_converter, python, kind) for kind in LlamaCpp.TYPES]
    return [
        *(Ours(quantization, options) for quantization in ("none", *args.quantizations)),
        Vllm(args.vllm), OpenVino(args.openvino), *llama, TransformersServe(python),
    ]  # fmt: skip


def choose(peers: Sequence[Peer], wanted: Sequence[str]) -> list[Peer]:
    """Those that are wanted and can be started; the others are named. Raises ValueError for unknown ones."""
    if unknown := set(wanted) - {peer.key for peer in peers}:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    chosen = []
    for peer in peers:
        if wanted and peer.key not in wanted:
            continue
        if reason := peer.missing():
            print(f"{peer.key} is left out: {reason}", flush=True)
        else:
            chosen.append(peer)
    return chosen


def turned(peers: Sequence[Peer], number: int) -> list[Peer]:
    """The order of a round."""
    first = number % len(peers)
    return [*peers[first:], *peers[:first]]


def read_turns(path: Path | None) -> list[Turn]:
    if path is None or not path.exists():
        return []
    return [Turn.of_json(given) for given in json.loads(path.read_text())]


def write_turns(path: Path | None, turns: Sequence[Turn]) -> None:
    if path is not None:
        text = ",\n".join(json.dumps(dataclasses.asdict(turn)) for turn in turns)
        path.write_text(f"[\n{text}\n]\n")


def tell(turn: Turn) -> None:
    rows = {row.part: row for row in ROWS}
    told = []
    for name, figure in turn.figures.items():
        value = "refused" if figure.value is None else shown(figure.value / rows[name].unit)
        told.append(f"{name} {value} ({figure.others:.1%})")
    print(f"round {turn.round}, {turn.peer}, memory {turn.memory_rate / 1e9:.1f} GB/s: {', '.join(told)}")
    if turn.error:
        print(f"  failed: {turn.error}")
    sys.stdout.flush()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def write_report(args: argparse.Namespace, peers: Sequence[Peer], turns: Sequence[Turn], weights: int) -> str:
    """Into the folder for documents, and as text."""
    columns = [Column(peer.key, peer.name, peer.is_quantized) for peer in peers]
    whole = [column for column in columns if not column.is_quantized]
    quantized = [column for column in columns if column.is_quantized]
    title = f"{args.shape}, {os.cpu_count()} cores, {processor()}, {datetime.date.today()}"
    name = f"peers-{args.shape}"
    has_ours = len(whole) > 1 and whole[0].key == "ours"
    versions = {peer.name: peer.version() for peer in peers if not peer.is_quantized}
    ends = {peer.name: peer.eos for peer in peers if not peer.is_quantized}
    lines = [f"# Beside other servers: {title}", "", f"![the same as bars]({name}.svg)", ""]
    if whole:
        lines += ["16 bits a weight:", "", table(turns, whole, has_ours), ""]
    if quantized:
        lines += ["Fewer bits, so compared among themselves only:", "", table(turns, quantized, False), ""]
    told = notes(turns, versions, weights)
    told.append(f"Answers have {args.output_tokens} tokens.")
    told.append("End of sequence ignored by " + "; ".join(f"{who}: {how}" for who, how in ends.items()) + ".")
    text = "\n".join([*lines, *(f"- {note}" for note in told)]) + "\n"
    (args.docs / f"{name}.md").write_text(text)
    (args.docs / f"{name}.svg").write_text(plot(turns, columns, title))
    return text


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    python = sys.executable
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--servers", nargs="+", default=[], help="names; all that are found unless given")
    parser.add_argument(
        "--quantizations",
        nargs="*",
        default=["int8"],
        help="ours again with each: int8 and int4 at load, or awq and such in the files",
    )
    parser.add_argument("--vllm", metavar="PYTHON", default=python, help="that has vLLM's build for CPUs")
    parser.add_argument("--openvino", metavar="PYTHON", default=python, help="with optimum-cli beside it")
    parser.add_argument("--transformers", metavar="PYTHON", default=python, help="that has its extra serving")
    parser.add_argument("--llama-server", metavar="PROGRAM", default="llama-server")
    parser.add_argument(
        "--llama-converter", type=Path, metavar="FILE",
        help="convert_hf_to_gguf.py of llama.cpp's source; run by the Python of --transformers",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="to go on behind those in --json")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of a part in a turn; its median counts")
    parser.add_argument("--max-others", type=float, default=0.03, help="share of the cores")
    parser.add_argument("--folder", type=Path, help="keeps checkpoints, what peers make of them, and logs")
    parser.add_argument("--json", type=Path, help="figures of all turns; those that it has count, too")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="for the table and the plot")
    parser.add_argument("--lock", type=Path, help="a file that is locked while a server runs")
    return parser.parse_known_args()


def prepare(peers: Sequence[Peer], checkpoint: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Each peer's model, without the peers that fail to make theirs."""
    models: dict[str, Path] = {}
    with locked(args.lock):
        if not (checkpoint / "config.json").exists():
            make_checkpoint(checkpoint, args.shape)
        for peer in peers:
            try:
                models[peer.key] = peer.prepare(checkpoint, args.folder)
            except RuntimeError as error:
                print(f"{peer.key} is left out: {error}", flush=True)
    return models


def main() -> None:
    args, options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        args.folder = (args.folder or Path(scratch)).resolve()
        args.folder.mkdir(parents=True, exist_ok=True)
        try:
            peers = choose(all_peers(args, options), args.servers)
        except ValueError as error:
            sys.exit(str(error))
        checkpoint = args.folder / args.shape
        models = prepare(peers, checkpoint, args)
        peers = [peer for peer in peers if peer.key in models]
        info = read_model_info(checkpoint).text
        plan = Plan(
            checkpoint=checkpoint, folder=args.folder, parts=args.parts, num_output=args.output_tokens,
            limits=Limits(os.cpu_count() or 1, kv_bytes(info)), num_repeats=args.repeats,
            max_others=args.max_others, lock=args.lock,
        )  # fmt: skip
        turns = read_turns(args.json)
        for number in range(args.first_round, args.first_round + args.rounds):
            for peer in turned(peers, number):
                turns.append(take_turn(peer, models[peer.key], plan, number))
                tell(turns[-1])
                write_turns(args.json, turns)
        print("\n" + write_report(args, peers, turns, 2 * num_weights(info)))


if __name__ == "__main__":
    main()
