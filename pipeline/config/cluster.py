"""Options of a pipeline over several machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.config.base import at_least, option

PORTS = re.compile(r"(\d+)-(\d+)")
CHOSEN_BY_RAY = ("node_rank", "master_addr", "node_token_file", "node_address")
OF_RAY = ("ray_cpus", "ray_gpus")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    placement: str = option(
        "none",
        "who starts the launchers of the nodes; none: you do, one on each; ray: a Ray cluster, of which this "
        "command is a driver; needs the extra ray, see docs/nodes.md",
        choices=("none", "ray"),
    )
    nnodes: int = option(
        1,
        "machines of the pipeline, each with one launcher; all have the shape that --tp, --dp and --vit say. "
        "Nodes may join later, and leave",
        metavar="N",
    )
    node_rank: int = option(
        0, "which of the nodes this is; node 0 is the head, which serves HTTP and decodes media", metavar="R"
    )
    master_addr: str = option("", "host name or address of the head, for all nodes", metavar="HOST")
    master_port: int = option(
        29400, "port of the head for the launchers of other nodes; the next one is used, too", metavar="PORT"
    )
    node_token_file: str = option(
        "",
        "file with the secret that all nodes share, of at least 16 characters; its owner alone may read it",
        metavar="FILE",
    )
    node_address: str = option(
        "",
        "address of this machine at which the other nodes reach its workers (default: of the interface that "
        "leads to the head; for the head --master-addr)",
        metavar="ADDRESS",
    )
    node_ports: str = option(
        "",
        "ports of this machine for the edges to workers of other nodes (default: free ones)",
        metavar="FIRST-LAST",
    )
    node_timeout: float = option(
        10.0,
        "seconds without a word from the head after which a node kills its workers; the head counts it as "
        "lost after one and a half times as many, at least 5 s more",
        metavar="SECONDS",
    )
    nodes_per_group: int = option(
        1,
        "nodes over which the ranks of each LLM group are spread evenly, for models that one machine cannot "
        "hold; needs --trusted-network",
        metavar="N",
    )
    trusted_network: bool = option(
        False,
        "the network between the nodes is closed to others: libraries that move tensors between ranks there "
        "(gloo, NCCL) may do so unencrypted",
    )
    head_only: bool = option(False, "the head has no ViT and no LLM: the other nodes compute")
    vit_only: bool = option(
        False,
        "this node has ViTs only, which work for the LLMs of other nodes; with --placement ray: all nodes "
        "but the head",
    )
    ray_cpus: int | None = option(
        None, "CPUs that Ray sets aside for each node (default: one for each worker there)", metavar="N"
    )
    ray_gpus: int | None = option(
        None,
        "GPUs that Ray sets aside for each node (default: one for each LLM rank there, or each ViT where "
        "there is none; none with --device cpu)",
        metavar="N",
    )

    def __post_init__(self) -> None:
        at_least(self, nnodes=1, node_rank=0, master_port=1, node_timeout=1, nodes_per_group=1)
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} must be less than nnodes, {self.nnodes}")
        if self.master_port > 65534:
            raise ValueError(
                f"master_port {self.master_port} must be at most 65534: the next port is used, too"
            )
        self._check_placement()
        if self.nnodes == 1:
            named = [name for name in ("head_only", "vit_only", "trusted_network") if getattr(self, name)]
            named += ["nodes_per_group"] if self.nodes_per_group > 1 else []
            if named:
                raise ValueError(f"{named[0]} needs nnodes of 2 or more")
            return
        self.ports()
        if self.is_placed:
            return
        for name in ("master_addr", "node_token_file"):
            if not getattr(self, name):
                raise ValueError(f"nnodes {self.nnodes} needs {name}")
        if self.nnodes % self.nodes_per_group:
            raise ValueError(
                f"nnodes {self.nnodes} must be a multiple of nodes_per_group, {self.nodes_per_group}"
            )
        if self.nodes_per_group > 1 and (self.head_only or self.vit_only):
            raise ValueError(
                "with nodes_per_group of 2 or more each node has ranks: no head_only, no vit_only"
            )
        if self.nodes_per_group > 1 and not self.trusted_network:
            raise ValueError(
                f"nodes_per_group {self.nodes_per_group} needs trusted_network: the ranks' tensors cross the "
                "network unencrypted"
            )
        if self.head_only and self.node_rank:
            raise ValueError("head_only is an option of node 0")
        if self.vit_only and not self.node_rank:
            raise ValueError("vit_only is an option of other nodes than the head")

    def _check_placement(self) -> None:
        at_least(self, ray_cpus=1, ray_gpus=0)
        for name in CHOSEN_BY_RAY if self.is_placed else ():
            if getattr(self, name):
                raise ValueError(f"{name} is not to be given with placement 'ray', which chooses it")
        for name in () if self.is_placed else OF_RAY:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} needs placement 'ray'")

    @property
    def is_placed(self) -> bool:
        """This launcher only has others started."""
        return self.placement != "none"

    @property
    def has_nodes(self) -> bool:
        return self.nnodes > 1

    @property
    def is_head(self) -> bool:
        return self.node_rank == 0

    def ports(self) -> range:
        """Those of `node_ports`; empty: any free ones. Raises ValueError."""
        if not self.node_ports:
            return range(0)
        found = PORTS.fullmatch(self.node_ports)
        if found is None or not 1 <= int(found[1]) <= int(found[2]) <= 65535:
            raise ValueError(f"node_ports {self.node_ports!r} must be FIRST-LAST, two ports in order")
        return range(int(found[1]), int(found[2]) + 1)
