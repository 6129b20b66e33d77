"""Logging of one process: to standard error, each line with the name of its worker."""

from __future__ import annotations

import logging
import sys

# On a terminal a line erases what the launcher has drawn there of the workers' progress.
ERASE = "\r\x1b[2K"


def configure(name: str, level: str) -> None:
    erase = ERASE if sys.stderr.isatty() else ""
    logging.basicConfig(
        level=level.upper(),
        format=f"{erase}%(levelname).1s %(asctime)s {name:<12} %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("PIL").setLevel(logging.WARNING)
