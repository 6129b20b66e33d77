"""Configuration: one frozen dataclass and one file a role.

An option's default, type and help live here only; the command line is read off them. What is learned at run
time (the number of KV blocks, say) is not configuration: it is returned in `WorkerReady`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.api import MAX_CONNECTIONS, ApiConfig, ApiKey
from pipeline.config.base import MIB
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
    launcher: LauncherConfig = field(default_factory=LauncherConfig)

    @property
    def num_vits(self) -> int:
        return self.num_ranks if self.vit.vit is None else self.vit.vit

    @property
    def vit_quantization(self) -> str:
        chosen = self.vit.vit_quantization
        return self.llm.quantization if chosen is None else chosen

    @property
    def num_ranks(self) -> int:
        """LLM ranks of all groups; group g has the ranks g · tp to (g + 1) · tp - 1, and the first of them
        leads it."""
        return self.llm.dp * self.llm.tp

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
