"""NIXL's agent, with UCX: over tcp between CPU machines, over RDMA where there is any."""

from __future__ import annotations

import importlib
import os
from typing import Any

from workers.carrier.nixl import AgentError, TransferState

# The package `nixl` chooses between the builds for CUDA 12 and 13; each of them works without a GPU.
MODULES = ("nixl._api", "nixl_cu12._api", "nixl_cu13._api")
STATES = {"DONE": TransferState.DONE, "PROC": TransferState.UNDER_WAY, "ERR": TransferState.LOST}


def load_nixl() -> Any | None:
    """None where it is not installed, or does not load."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue
    return None


class NixlAgent:
    """`interface`: the network device at which it listens; empty: UCX chooses."""

    def __init__(self, nixl: Any, name: str, interface: str) -> None:
        if interface:
            os.putenv("UCX_NET_DEVICES", interface)  # else UCX listens at all of them
        self._agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))

    def register(self, address: int, nbytes: int) -> object:
        return self._call(self._agent.register_memory, [(address, nbytes, 0, "")], "DRAM")

    def deregister(self, registered: object) -> None:
        self._call(self._agent.deregister_memory, registered)

    def metadata(self) -> bytes:
        found: bytes = self._call(self._agent.get_agent_metadata)
        return found

    def add_peer(self, metadata: bytes) -> str:
        name = self._call(self._agent.add_remote_agent, metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        self._call(self._agent.remove_remote_agent, name)

    def read(self, peer: str, local: int, remote: int, nbytes: int) -> object:
        ends = [self._call(self._agent.get_xfer_descs, [(at, nbytes, 0)], "DRAM") for at in (local, remote)]
        transfer = self._call(self._agent.initialize_xfer, "READ", *ends, peer, b"")
        if self._call(self._agent.transfer, transfer) == "ERR":
            raise AgentError("the transfer was refused")
        return transfer

    def state(self, transfer: object) -> TransferState:
        return STATES[self._call(self._agent.check_xfer_state, transfer)]

    def release(self, transfer: object) -> None:
        self._call(self._agent.release_xfer_handle, transfer)

    @staticmethod
    def _call(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise AgentError(f"{type(error).__name__}: {error}") from error
