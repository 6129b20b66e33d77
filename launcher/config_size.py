"""Whether the configuration fits the message in which the fork server gets a worker's specification."""

from __future__ import annotations

import dataclasses

import msgspec

from launcher.members import all_workers, doors_of
from pipeline.config import Config
from pipeline.process.fork_server import MAX_REQUEST

# Of that message, for what else is in it: 1024 quarantined requests take 10 KiB, 512 cores 3 KiB.
OTHERS_BYTES = 14 << 10
LONG = 1 << 10  # bytes from which on an option is named
# Where there are several nodes: names and epochs; a door's label and its url, of an IPv6 address.
WORKER_BYTES, DOOR_BYTES = 32, 72


def _bytes_of_nodes(config: Config) -> int:
    if not config.cluster.has_nodes:
        return 0
    return sum(WORKER_BYTES + DOOR_BYTES * len(doors_of(worker, config)) for worker in all_workers(config))


def check_size(config: Config) -> None:
    """Raises ValueError, which names the long options."""
    of_nodes = _bytes_of_nodes(config)
    size, limit = len(msgspec.msgpack.encode(config)), MAX_REQUEST - OTHERS_BYTES - of_nodes
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
    if of_nodes:
        what += f" with the addresses of {config.cluster.nnodes} nodes"
    raise ValueError(f"{what}; they have {size}: {named}" if named else f"{what}; they have {size}")
