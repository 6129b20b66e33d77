"""Where units run: on this machine, forked by the spawner, and on the other nodes, by order."""

from __future__ import annotations

import importlib.metadata
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.checkpoint_digest import checkpoint_digest
from launcher.fleet import Fleet
from launcher.members import node_spec, shared_options, workers_on
from launcher.nodes import Nodes, executed_by, has_worked
from launcher.spawner import Spawner
from launcher.units import Child, Unit
from pipeline.config import Config
from pipeline.process.nodes import HEAD
from pipeline.transport.cluster import NO_NODES, Far, write_spec
from pipeline.transport.ends import Publisher, Receiver
from pipeline.transport.joining import JoinListener, LaunchersKeys, new_keys, read_token
from pipeline.transport.poller import Pollable
from pipeline.transport.sockets import Sockets
from pipeline.wire.control import NodeState, PipelineState, StatusMessage
from pipeline.wire.nodes import NODE_ID_BYTES, JoinRequest, OrdersMessage, ReportMessage
from pipeline.wire.topology import ORDERS, REPORTS, Role

DISTRIBUTION = "vlm-pipeline"


def join_request(config: Config, model_folder: Path, public_key: bytes) -> JoinRequest:
    """What this node says of itself; the head compares it with its own."""
    return JoinRequest(
        node_id=secrets.token_bytes(NODE_ID_BYTES),
        node_rank=config.cluster.node_rank,
        version=importlib.metadata.version(DISTRIBUTION),
        checkpoint=checkpoint_digest(model_folder),
        options=shared_options(config),
        public_key=public_key,
        is_vit_only=config.cluster.vit_only,
    )


class Machines:
    def __init__(
        self, config: Config, model_folder: Path, run_dir: Path, environment: dict[str, str], fleet: Fleet
    ) -> None:
        """`environment` is the workers'. Raises OSError where the head cannot listen, ValueError for a bad
        token."""
        self._fleet = fleet
        self._nodes: Nodes | None = None
        self._sockets: Sockets | None = None
        self._node_of, own = node_spec(config).node_of, None
        workers = workers_on(HEAD, config)
        if config.cluster.has_nodes:
            keys = new_keys()
            own = node_spec(config, keys)
            write_spec(run_dir, own)
            self._nodes = self._listen(config, join_request(config, model_folder, keys.public))
            for unit in fleet.units:
                unit.is_absent = unit.nodes != (HEAD,) or (config.cluster.head_only and unit.holds_weights)
        if config.cluster.head_only:
            workers = [worker for worker in workers if worker.role not in (Role.LLM, Role.VIT)]
        self._spawner = Spawner(config, model_folder, run_dir, environment, workers, own)

    def _listen(self, config: Config, expected: JoinRequest) -> Nodes:
        cluster = config.cluster
        keys = LaunchersKeys(read_token(Path(cluster.node_token_file)))
        self._sockets = Sockets(JoinListener(cluster.node_address, cluster.master_port, keys), {})
        reports: Receiver[ReportMessage] = self._sockets.receiver(REPORTS)
        orders: Publisher[OrdersMessage] = self._sockets.publisher(
            ORDERS, lambda topic, _: len(topic) == NODE_ID_BYTES
        )
        units = {
            node: [unit for unit in self._fleet.units if node in unit.nodes]
            for node in range(1, cluster.nnodes)
        }
        return Nodes(units, expected.public_key, expected, reports, orders, cluster.node_timeout)

    def start(self) -> None:
        self._spawner.start()

    @property
    def sources(self) -> list[Receiver[Any] | Publisher[Any] | Pollable]:
        """To be polled."""
        if self._nodes is None:
            return [self._spawner]
        return [self._spawner, self._nodes.reports, self._nodes.orders]

    def read(self) -> bool:
        """Brings every process of this machine up to date. False: the fork server has ended."""
        return self._spawner.read()

    def hear(self, now: float) -> list[StatusMessage]:
        """What workers on other nodes tell the launcher. Nodes that are silent for too long are lost."""
        if self._nodes is None:
            return []
        statuses = self._nodes.read(now)
        self._nodes.lose_silent(now)
        self._nodes.release_idle(self._fleet)
        return statuses

    def on_new_weights(self, model_folder: Path) -> None:
        """Nodes that join from now on must have these."""
        if self._nodes is not None:
            self._nodes.expect(checkpoint_digest(model_folder))

    @property
    def has_news(self) -> bool:
        return self._nodes is not None and self._nodes.has_news

    def states(self) -> tuple[NodeState, ...]:
        return () if self._nodes is None else self._nodes.states()

    def publish(self, state: PipelineState) -> None:
        if self._nodes is not None:
            self._nodes.publish(state)

    def expel(self, unit: Unit, reason: str, now: float) -> bool:
        """Sends the unit's nodes away. False for a unit with a member on this machine."""
        if self._nodes is None or HEAD in unit.nodes:
            return False
        for node in unit.nodes:
            self._nodes.expel(node, reason, now)
        return True

    def fork(
        self, unit: Unit, quarantined: dict[Role, tuple[bytes, ...]], listening: Sequence[socket.socket]
    ) -> list[Child]:
        """`listening`: the sockets of the HTTP endpoint."""
        epochs, far = self._fleet.epochs(), self._far()
        children: list[Child] = []
        for worker in unit.members:
            node = self._node_of(worker)
            if self._nodes is None or node == HEAD:
                children.append(self._spawner.fork(worker, epochs, quarantined, far, listening))
            else:
                children.append(self._nodes.fork(node, worker, unit.epoch))
        return children

    def _far(self) -> Far:
        if self._nodes is None:
            return NO_NODES
        keys = {node.rank: node.public_key for node in self._nodes.states()}
        return Far(keys, {str(child.worker): child.urls for child in self._fleet.children if child.urls})

    def has_worked(self, unit: Unit) -> bool:
        return has_worked(unit) or any(
            self._spawner.worked(worker) for worker in unit.members if self._spawner.has(worker)
        )

    def clean_up(self, unit: Unit) -> tuple[bytes, ...]:
        """Of a reaped unit. Returns the digests of the requests that were executing."""
        digests = set(executed_by(unit))
        for worker in unit.members:
            if self._spawner.has(worker):
                digests.update(self._spawner.clean_up_worker(worker, unit.epoch))
        return tuple(sorted(digests))

    def has_hung(self, child: Child, now: float, patience_s: float) -> bool:
        """Of a serving worker of this machine; the launchers of other nodes watch their own."""
        return self._spawner.has(child.worker) and not self._spawner.has_moved(child, now, patience_s)

    def stop(self, children: Sequence[Child]) -> None:
        """After the end was published."""
        self._spawner.stop([child for child in children if self._spawner.has(child.worker)])
        if self._sockets is not None:
            self._sockets.close(linger_ms=500)  # so that the other nodes read that the pipeline ends
