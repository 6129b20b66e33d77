from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import torch

from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.random_checkpoint.lora import write_adapter
from tools.random_checkpoint.quantized import RECIPES, quantize_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.random_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of the text, instead of the shape's own")
    parser.add_argument("--split-experts", action="store_true", help="three matrices for each expert")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="NAME",
        help="adapters of all its linear layers, in FOLDER-NAME",
    )
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="on which the tensors are made")
    parser.add_argument("--quantized", choices=RECIPES, help="as the format's maker writes it")
    parser.add_argument(
        "--group-size", type=int, default=128, help="numbers, or sides of a block, of one scale"
    )
    args = parser.parse_args()
    make = functools.partial(
        make_checkpoint, name=args.shape, device=torch.device(args.device), num_layers=args.layers,
        has_split_experts=args.split_experts,
    )  # fmt: skip
    try:
        if args.quantized is None:
            make(args.folder)
            write_adapters(args.folder, args)
            return
        args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.parent) as dense:
            make(Path(dense))
            quantize_checkpoint(Path(dense), args.folder, args.quantized, args.group_size)
            write_adapters(Path(dense), args)
    except ValueError as error:
        parser.error(str(error))


def write_adapters(dense: Path, args: argparse.Namespace) -> None:
    for name in args.lora:
        write_adapter(dense, args.folder.with_name(f"{args.folder.name}-{name}"), args.lora_rank)


main()
