"""Whether another process can map a pool of this one, tried before the pool is announced.

An IPC handle may be given where no other process can open it: in a container without a shared PID namespace,
or under some drivers.
"""

from __future__ import annotations

import subprocess
import sys

import msgspec

from pipeline.wire.errors import PipelineError
from pipeline.wire.handles import PoolInfo

MAPPING_CHECK_S = 60.0
MAPPING_CHECK = """
import sys, msgspec
from pipeline.transport.tensors import PoolMap
from pipeline.wire.handles import PoolInfo
info = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=PoolInfo)
PoolMap(int(sys.argv[1]) if len(sys.argv) > 1 else None).open(info)
"""


def check_mapping(info: PoolInfo, device: int | None = None) -> None:
    """Starts a process that maps the pool as a consumer does. Raises PipelineError where that fails."""
    command = [sys.executable, "-c", MAPPING_CHECK, *([] if device is None else [str(device)])]
    try:
        done = subprocess.run(
            command, input=msgspec.msgpack.encode(info), capture_output=True, timeout=MAPPING_CHECK_S
        )
    except subprocess.TimeoutExpired:
        raise PipelineError(
            f"pool {info.pool_id} could not be mapped by another process within {MAPPING_CHECK_S:.0f} s"
        ) from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise PipelineError(f"pool {info.pool_id} cannot be mapped by another process: {words[-1]}")
