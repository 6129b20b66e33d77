"""Which carriers a chunk passes."""

from __future__ import annotations

import pytest

from pipeline.process.nodes import NodeMap
from pipeline.transport.cluster import NodeSpec
from pipeline.transport.keys import KeyPair
from pipeline.wire.topology import Role, WorkerId


@pytest.mark.parametrize(
    ("vit", "lead", "passes"),
    [
        (0, 0, ()),
        (2, 4, (0, 1)),  # pixels to node 1
        (0, 4, (0, 1)),  # embeddings from the head
        (3, 0, (0, 1)),  # pixels to node 1, embeddings back
        (2, 8, (0, 1, 2)),
    ],
)
def test_the_way_of_a_chunk(vit: int, lead: int, passes: tuple[int, ...]) -> None:
    """Two ViTs and four ranks a node."""
    spec = NodeSpec(node=1, vits_per_node=2, ranks_per_node=4, own=KeyPair(b"", b""))
    nodes = NodeMap(spec, 3)
    assert nodes.way(vit, lead) == passes
    assert list(nodes.vits_on(1)) == [2, 3]
    assert (nodes.carrier_to(4), nodes.carrier_to(8)) == (None, WorkerId(Role.CARRIER, 2))


def test_on_one_machine_there_is_no_carrier() -> None:
    nodes = NodeMap(None)
    assert (nodes.carrier, nodes.way(3, 7), nodes.carrier_to(7), list(nodes.vits_near(7))) == (
        None,
        (),
        None,
        [],
    )
