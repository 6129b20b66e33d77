from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tools.random_checkpoint import SHAPES, make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.random_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of the text, instead of the shape's own")
    parser.add_argument("--split-experts", action="store_true", help="three matrices for each expert")
    parser.add_argument("--device", default="cpu", help="on which the tensors are made")
    args = parser.parse_args()
    try:
        make_checkpoint(args.folder, args.shape, torch.device(args.device), args.layers, args.split_experts)
    except ValueError as error:
        parser.error(str(error))


main()
