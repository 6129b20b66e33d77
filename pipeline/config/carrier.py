"""Options of the carriers, which copy tensors between nodes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.base import at_least, option


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierConfig:
    carrier: str = option(
        "zeromq",
        "how tensors travel between nodes; zeromq: encrypted; nixl: by NIXL over ports of its own, in the "
        "clear, for trusted networks; auto: nixl between nodes that both have it, where a probe arrives",
        choices=("auto", "zeromq", "nixl"),
    )
    carrier_pool_mib: int = option(
        256,
        "memory of each node for pixels from other nodes, and as much for embeddings from there, in MiB",
        metavar="MIB",
    )

    def __post_init__(self) -> None:
        at_least(self, carrier_pool_mib=1)
