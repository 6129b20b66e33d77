"""Which worker is on which node, and the carriers between them. Pure.

Node 0 is the head: preprocess is there. Each node has a carrier, whose rank is the node's number.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from pipeline.transport.cluster import NodeSpec
from pipeline.wire.topology import Role, WorkerId

HEAD = 0


class NodeMap:
    def __init__(self, spec: NodeSpec | None, count: int = 1) -> None:
        """`spec`: of this process' node; None where there is but one."""
        self._spec, self.count = spec, count
        self.here = HEAD if spec is None else spec.node

    def of(self, worker: WorkerId) -> int:
        return HEAD if self._spec is None else self._spec.node_of(worker)

    @property
    def carrier(self) -> WorkerId | None:
        """The carrier of this node; None where there is but one node."""
        return None if self._spec is None else WorkerId(Role.CARRIER, self.here)

    def carrier_to(self, lead: int) -> WorkerId | None:
        """The carrier that brings this node's embeddings to an LLM group; None: they need none."""
        node = self.of(WorkerId(Role.LLM, lead))
        return WorkerId(Role.CARRIER, node) if node != self.here else None

    def holder_of(self, lead: int) -> WorkerId:
        """Who holds the leases on this node's embeddings for an LLM group."""
        return self.carrier_to(lead) or WorkerId(Role.LLM, lead)

    def way(self, vit: int, lead: int) -> tuple[int, ...]:
        """The nodes whose carriers a chunk passes: its pixels from preprocess to the ViT, its embeddings from
        there to the LLM group."""
        places = HEAD, self.of(WorkerId(Role.VIT, vit)), self.of(WorkerId(Role.LLM, lead))
        hops = [hop for hop in itertools.pairwise(places) if hop[0] != hop[1]]
        return tuple(sorted({node for hop in hops for node in hop}))

    def vits_near(self, lead: int) -> Collection[int]:
        """The ViTs on the node of a group; empty: all are."""
        return () if self._spec is None else self._spec.vits_near(lead)

    def vits_on(self, node: int) -> Collection[int]:
        return () if self._spec is None else self._spec.vits_on(node)

    def leads_here(self, leads: Sequence[int]) -> Sequence[int]:
        """Of these groups, those on this node."""
        return leads if self._spec is None else self._spec.leads_on(self.here, leads)

    def leads_near(self, vit: int, leads: Sequence[int]) -> Sequence[int]:
        """Of these groups, those on the node of a ViT."""
        return leads if self._spec is None else self._spec.leads_on(self.of(WorkerId(Role.VIT, vit)), leads)

    def is_here(self, worker: WorkerId) -> bool:
        return self.of(worker) == self.here
