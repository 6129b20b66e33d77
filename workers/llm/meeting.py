"""How the ranks of a group over several nodes meet: at a port of the lead's node, by torch.distributed.

Neither that port nor what gloo and NCCL open is encrypted: `--trusted-network` says that this is allowed.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.process.phases import WAITING
from pipeline.process.process import WorkerContext
from pipeline.transport.cluster import Cluster, meeting_label, url_of
from pipeline.transport.ends import Receiver
from pipeline.transport.interfaces import interface_of
from pipeline.transport.poller import Poller
from pipeline.wire.control import ControlMessage
from pipeline.wire.topology import Role, WorkerId


class Meeting(NamedTuple):
    """`host` and `port`: the lead's. `listening`: on the lead its socket, which it then owns; else None.
    `is_on_leads_node`: where pools of embeddings are."""

    host: str
    port: int
    listening: int | None
    own_address: str
    is_on_leads_node: bool

    def join(self, backend: str, rank: int, size: int, timeout: timedelta) -> None:
        """Makes torch's default group."""
        # Without a socket of its own the store would listen on every interface.
        own: dict[str, Any] = {} if self.listening is None else {"master_listen_fd": self.listening}
        store = TCPStore(self.host, self.port, size, self.listening is not None, timeout, **own)
        options: Any = None
        if backend == "gloo":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.own_address)]
            options._timeout = timeout
        else:
            if not (interface := interface_of(self.own_address)):
                raise ValueError(f"no interface has the address {self.own_address}")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, pg_options=options
        )


def wait_for_meeting(
    context: WorkerContext, cluster: Cluster, control: Receiver[ControlMessage], lead: int
) -> Meeting:
    """Where the group meets; a rank of another node than the lead's waits until that is known."""
    label, worker, listening = meeting_label(lead), WorkerId(Role.LLM, lead), None
    if cluster.doors.has(label):
        listening = os.dup(cluster.doors.descriptor(label))
        url = url_of(listening)
    else:
        poller = Poller(control)
        while not (url := cluster.addresses.url(worker, label)):
            context.progress(f"{WAITING}{worker}", 0, 1)
            poller.wait(1.0)
            context.read_control(control)
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    is_near = context.nodes.is_here(worker)
    return Meeting(host.strip("[]"), int(port), listening, context.config.cluster.node_address, is_near)
