from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.random_checkpoint.lora import write_adapter


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
    args = parser.parse_args()
    try:
        make_checkpoint(args.folder, args.shape, torch.device(args.device), args.layers, args.split_experts)
    except ValueError as error:
        parser.error(str(error))
    for name in args.lora:
        write_adapter(args.folder, args.folder.with_name(f"{args.folder.name}-{name}"), args.lora_rank)


main()
