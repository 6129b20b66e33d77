"""As `tools/soak.py`, over several nodes: kills workers of every node, launchers, and cuts links.

    python -m tools.soak_nodes --nnodes 3 --minutes 10
    python -m tools.soak_nodes --nnodes 2 --minutes 5 --victims launcher link

The reference is what the head's group alone says, before other nodes join; so every answer is also one
node's.
The launcher of a node that has been killed is started again, and a link is up again after `--cut` seconds.
With root, nodes are network namespaces with 1 ms of delay where the kernel has netem; else they are addresses
of the loopback interface, and no link is cut.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from pipeline.client.client import PipelineClient
from pipeline.transport.keys import make_client_keys, make_server_keys
from pipeline.wire.topology import DIRECT_EDGES
from tools.local_nodes import LOOPBACK, Launchers, LocalNodes, end_at_sigterm, wait_until_all_serve
from tools.namespaces import namespaces, set_link
from tools.processes import free_port
from tools.soak import RETURN_S, Soak, add_arguments, report

LAUNCHER, LINK = "launcher", "link"


class SoakNodes(Soak):
    """The first client is in the head's run directory; all others come by its gateway."""

    def __init__(
        self, args: argparse.Namespace, launchers: Launchers, remote: tuple[str, Path], can_cut: bool
    ) -> None:
        super().__init__(args, launchers.processes[0].pid, launchers.run_dir(0), remote)
        self._launchers, self._can_cut = launchers, can_cut

    async def prepare(self) -> None:
        """The other nodes join."""
        for rank in range(1, len(self._launchers.nodes.addresses)):
            await asyncio.to_thread(self._launchers.start, rank)
        await asyncio.to_thread(
            wait_until_all_serve, self._launchers.url, len(self._launchers.nodes.addresses)
        )

    def pids(self) -> dict[str, int]:
        return self._launchers.workers()

    def victims(self, names: list[str]) -> list[str]:
        others = range(1, len(self._launchers.nodes.addresses))
        kinds = [LAUNCHER, *([LINK] if self._can_cut else [])]
        return super().victims(names) + [
            f"{kind}.{rank}" for kind in kinds if kind in self._args.victims for rank in others
        ]

    async def strike(self, client: PipelineClient, victim: str) -> None:
        kind, _, rank = victim.partition(".")
        if kind not in (LAUNCHER, LINK):
            await super().strike(client, victim)
            return
        self.found.kills[victim] += 1
        start = time.monotonic()
        if kind == LAUNCHER:
            self._launchers.kill(int(rank))
            await asyncio.to_thread(self._launchers.start, int(rank))
        else:
            inside = self._launchers.nodes.insides[int(rank)]
            set_link(inside, is_up=False)
            await asyncio.sleep(self._args.cut)
            set_link(inside, is_up=True)
        while not self._all_serve(client):
            await asyncio.sleep(0.05)
            if time.monotonic() - start > self._args.cut + RETURN_S:
                self.found.wrong.append(f"not all serve {RETURN_S:.0f} s after {victim} was struck")
                return
        self.found.restarts.setdefault(kind, []).append(time.monotonic() - start)

    def _all_serve(self, client: PipelineClient) -> bool:
        """Of the number at which it was prepared."""
        return sum(state.is_ready for state in client.workers) >= self.num_workers


def run(args: argparse.Namespace, options: list[str], folder: Path) -> int:
    with contextlib.ExitStack() as opened:
        try:
            addresses, insides = opened.enter_context(namespaces(args.nnodes))
            can_cut = True
        except OSError as error:
            print(f"no links are cut: {error}", file=sys.stderr)
            addresses, insides, can_cut = list(LOOPBACK[: args.nnodes]), [], False
        keys, port = folder / "keys", free_port(len(DIRECT_EDGES))
        make_server_keys(keys)
        remote = f"tcp://{addresses[0]}:{port}", make_client_keys(keys, "soak")
        launchers = Launchers(folder, LocalNodes(folder, addresses, insides), *options)
        opened.callback(launchers.close)
        direct = ("--direct-port", str(port), "--direct-host", addresses[0], "--direct-keys", str(keys))
        launchers.start(0, "--host", addresses[0], *direct)
        found = asyncio.run(SoakNodes(args, launchers, remote, can_cut).run())
        launchers.close()
        lines = [line for rank in range(args.nnodes) for line in launchers.log(rank).splitlines()]
    return report(found, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, ["preprocess", "vit", "llm", "carrier", LAUNCHER, LINK])
    parser.add_argument("--nnodes", type=int, default=2)
    parser.add_argument("--cut", type=float, default=30.0, help="seconds for which a link is down")
    args, options = parser.parse_known_args()
    options = ["--dtype", "float32", "--max-attempts", "8", "--kv-cache-gib", "0.25", *options]
    end_at_sigterm()
    with tempfile.TemporaryDirectory(prefix="soak-nodes-") as folder:
        return run(args, options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
