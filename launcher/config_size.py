"""Whether the configuration fits the message in which the fork server gets a worker's specification."""

from __future__ import annotations

import dataclasses

import msgspec

from pipeline.config import Config
from pipeline.process.fork_server import MAX_REQUEST

# Of that message, for what else is in it: 1024 quarantined requests take 10 KiB, 512 cores 3 KiB.
OTHERS_BYTES = 14 << 10
LONG = 1 << 10  # bytes from which on an option is named


def check_size(config: Config) -> None:
    """Raises ValueError, which names the long options."""
    size, limit = len(msgspec.msgpack.encode(config)), MAX_REQUEST - OTHERS_BYTES
    if size <= limit:
        return
    sizes = {
        f"--{field.name.replace('_', '-')}": len(msgspec.msgpack.encode(getattr(section, field.name)))
        for section in (getattr(config, part.name) for part in dataclasses.fields(config))
        for field in dataclasses.fields(section)
    }
    sizes["--api-key-file"] += sizes.pop("--named-keys")  # which the file's are, and the environment's
    longest = sorted((name for name in sizes if sizes[name] >= LONG), key=lambda name: -sizes[name])
    named = ", ".join(f"{name} has {sizes[name]}" for name in longest)
    what = f"all options together may have {limit} bytes, because each worker gets them in one message"
    raise ValueError(f"{what}; they have {size}: {named}" if named else f"{what}; they have {size}")
