"""A Ray cluster on this machine, of several nodes that each declare CPUs and GPUs; for tests of
`--placement ray`.

    python -m tools.cluster --nodes 2 --cpus 8 --gpus 1
    RAY_ADDRESS=… python -m launcher --placement ray --nnodes 2 --device cpu --ray-gpus 1

It reads commands from its input, a line each: `add` adds a node, `remove NODE` kills one, by its id. The end
of the input ends the cluster. A node more than asked for is there, without CPUs: it holds Ray's own state, so
that any other may be removed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class LocalCluster:
    """Ray believes what its nodes declare; nothing is checked."""

    def __init__(self, cpus: int, gpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._cpus, self._gpus = cpus, gpus
        self._cluster: Any = Cluster()
        self._cluster.add_node(num_cpus=0, include_dashboard=False)
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> str:
        """A node; returns its id."""
        node = self._cluster.add_node(num_cpus=self._cpus, num_gpus=self._gpus)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def remove(self, name: str) -> None:
        """Kills the node's processes. Raises KeyError for an unknown one."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def close(self) -> None:
        """Kills every process: a node that ends in order takes half a minute."""
        for name in list(self._nodes):
            self.remove(name)
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        self._cluster.shutdown()  # what is left: the file that names the cluster


@contextlib.contextmanager
def local_cluster(nodes: int, cpus: int, gpus: int) -> Iterator[LocalCluster]:
    cluster = LocalCluster(cpus, gpus)
    try:
        for _ in range(nodes):
            print("added", cluster.add(), flush=True)
        yield cluster
    finally:
        cluster.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2, help="nodes that may be used (default: 2)")
    parser.add_argument("--cpus", type=int, default=8, help="CPUs that each declares (default: 8)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each declares (default: 0)")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with local_cluster(options.nodes, options.cpus, options.gpus) as cluster:
        print("ray at", cluster.address, flush=True)
        for line in sys.stdin:
            match line.split():
                case ["add"]:
                    print("added", cluster.add(), flush=True)
                case ["remove", name]:
                    cluster.remove(name)
                    print("removed", name, flush=True)
                case _:
                    print("commands are: add, remove NODE", flush=True)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
