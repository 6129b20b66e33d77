"""Options of tools that are clients: where the pipeline is."""

from __future__ import annotations

import argparse


def add_place(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run-dir", help="the pipeline's run directory")
    where.add_argument(
        "--url", help="tcp://HOST:PORT of a pipeline on another machine (its --direct-port); takes --keys"
    )
    parser.add_argument("--keys", metavar="FOLDER", help="this client's keys, made by tools/keys.py")
    parser.add_argument(
        "--model-folder",
        metavar="FOLDER",
        help="the files of the server's model, if they are not where the server has them",
    )
