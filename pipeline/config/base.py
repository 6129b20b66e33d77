"""How an option is declared."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

MIB = 1 << 20


def option(
    default: Any, text: str, choices: tuple[str, ...] = (), metavar: str = "", aliases: tuple[str, ...] = ()
) -> Any:
    """A field that is also an option of the command line."""
    return field(
        default=default, metadata={"help": text, "choices": choices, "metavar": metavar, "aliases": aliases}
    )


def at_least(config: object, **limits: float) -> None:
    for name, limit in limits.items():
        if (value := getattr(config, name)) is not None and not limit <= value < math.inf:
            raise ValueError(f"{name} must be at least {limit} and finite, got {value}")
