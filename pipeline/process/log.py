"""Logging of one process: to standard error, each line with the name of its worker."""

from __future__ import annotations

import logging


def configure(name: str, level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format=f"%(levelname).1s %(asctime)s {name:<12} %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("PIL").setLevel(logging.WARNING)
