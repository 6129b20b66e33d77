"""Configuration: one frozen dataclass and one file a role.

An option's default, type and help live here only; the command line is read off them. What is learned at run
time (the number of KV blocks, say) is not configuration: it is returned in `WorkerReady`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.api import MAX_CONNECTIONS, ApiConfig, ApiKey
from pipeline.config.base import MIB
from pipeline.config.carrier import CarrierConfig
from pipeline.config.cluster import ClusterConfig
from pipeline.config.direct import DirectConfig
from pipeline.config.launcher import LauncherConfig
from pipeline.config.llm import LlmConfig
from pipeline.config.model import DTYPES, ModelConfig
from pipeline.config.preprocess import MAX_OPEN_CHUNKS, MAX_OVERLOAD, PreprocessConfig
from pipeline.config.vit import VitConfig

__all__ = [
    "DTYPES",
    "MIB",
    "ApiConfig",
    "ApiKey",
    "CarrierConfig",
    "ClusterConfig",
    "Config",
    "DirectConfig",
    "LauncherConfig",
    "LlmConfig",
    "ModelConfig",
    "PreprocessConfig",
    "VitConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it; every worker is given the whole and reads its part."""

    model: ModelConfig = field(default_factory=ModelConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    direct: DirectConfig = field(default_factory=DirectConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    vit: VitConfig = field(default_factory=VitConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    carrier: CarrierConfig = field(default_factory=CarrierConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def vits_per_node(self) -> int:
        return self.ranks_per_node if self.vit.vit is None else self.vit.vit

    @property
    def num_vits(self) -> int:
        """Of all nodes; ViT i is on node i // vits_per_node."""
        return self.cluster.nnodes * self.vits_per_node

    @property
    def vit_quantization(self) -> str:
        chosen = self.vit.vit_quantization
        return self.llm.quantization if chosen is None else chosen

    def __post_init__(self) -> None:
        if self.carrier != CarrierConfig() and not self.cluster.has_nodes:
            raise ValueError("carriers are for nnodes of 2 or more")
        num_nodes = self.cluster.nodes_per_group
        if num_nodes > 1 and (self.llm.dp > 1 or self.llm.tp % num_nodes):
            raise ValueError(
                f"a group over {num_nodes} nodes has a tp that is a multiple of it, and dp 1: tp is "
                f"{self.llm.tp}, dp {self.llm.dp}"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.llm.dp * self.llm.tp // self.cluster.nodes_per_group

    @property
    def num_ranks(self) -> int:
        """LLM ranks of all groups on all nodes; group g has the ranks g · tp to (g + 1) · tp - 1, and the
        first of them leads it. Rank r is on node r // ranks_per_node."""
        return self.cluster.nnodes * self.ranks_per_node

    @property
    def has_gateway(self) -> bool:
        return self.direct.direct_port is not None

    @property
    def leads(self) -> tuple[int, ...]:
        return tuple(range(0, self.num_ranks, self.llm.tp))

    @property
    def max_requests_per_client(self) -> int:
        """Open at once. The endpoint is one client for all its tenants, so the credits of each tenant have to
        decide, not this: there is room for all that preprocess ever admits, and on each connection for one
        that it has not refused yet."""
        admitted = MAX_OVERLOAD * self.preprocess.max_open_requests
        return min(admitted + MAX_CONNECTIONS, MAX_OPEN_CHUNKS)  # more would not fit an edge
