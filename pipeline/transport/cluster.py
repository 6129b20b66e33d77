"""Sites between the nodes of a pipeline: tcp with CURVE, one port for each edge that a worker binds.

Each launcher makes a pair of keys for its node; the head publishes the public ones, and the addresses of all
bound edges. A worker proves its node's key in both directions: a process with another key is refused.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from pipeline.transport.keys import KeyPair
from pipeline.transport.tcp import set_tcp_options, tcp_url
from pipeline.wire.control import PipelineState
from pipeline.wire.errors import PipelineError
from pipeline.wire.topology import CARRIED, Edge, Role, WorkerId

logger = logging.getLogger(__name__)
HANDSHAKE_MS = 2000  # after which a connection that was not taken is tried again
BACKLOG = 128  # connections to a worker that has not started yet
DOMAIN = "nodes"  # of ZAP, ZeroMQ's authentication protocol
SPEC_FILE = "node"  # in the head's run directory


def label_of(edge: Edge, rank: int) -> str:
    """Names the edge to one binder among all edges."""
    return f"{edge.name}.{rank}"


def meeting_label(lead: int) -> str:
    """Of the port at which the ranks of a group over several nodes meet: torch.distributed's, not ours."""
    return f"ranks.{lead}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What a worker of a pipeline over several nodes has to know of them."""

    node: int
    vits_per_node: int
    ranks_per_node: int
    own: KeyPair
    doors: tuple[str, ...] = ()  # labels of the edges that it binds for other nodes, as its descriptors are
    keys: dict[int, bytes] = field(default_factory=dict)  # public ones, by node
    urls: dict[str, dict[str, str]] = field(default_factory=dict)  # by worker, then by label

    def node_of(self, worker: WorkerId) -> int:
        if worker.role is Role.VIT:
            return worker.rank // self.vits_per_node
        if worker.role is Role.LLM:
            return worker.rank // self.ranks_per_node
        return worker.rank if worker.role is Role.CARRIER else 0

    def vits_on(self, node: int) -> range:
        return range(node * self.vits_per_node, (node + 1) * self.vits_per_node)

    def leads_on(self, node: int, leads: Iterable[int]) -> list[int]:
        """Of these groups, those whose rank 0 is there."""
        return [lead for lead in leads if self.node_of(WorkerId(Role.LLM, lead)) == node]

    def vits_near(self, lead: int) -> range:
        """The ViTs on the node of a group."""
        return self.vits_on(self.node_of(WorkerId(Role.LLM, lead)))


def write_spec(run_dir: Path, spec: NodeSpec) -> None:
    """For clients in the run directory, which is private: with its key they reach the groups of all nodes."""
    (run_dir / SPEC_FILE).write_bytes(msgspec.json.encode(spec))


def read_spec(run_dir: Path) -> NodeSpec:
    """Raises PipelineError where the launcher has not written it, or has removed it."""
    try:
        return msgspec.json.decode((run_dir / SPEC_FILE).read_bytes(), type=NodeSpec)
    except OSError as error:
        raise PipelineError(f"the other nodes cannot be reached: {error}") from None


class Far(NamedTuple):
    """Where the workers of other nodes are reached, and with which keys: as in `NodeSpec`."""

    keys: dict[int, bytes]
    urls: dict[str, dict[str, str]]

    @classmethod
    def of(cls, state: PipelineState) -> Far:
        """As the head says."""
        return cls(
            {node.rank: node.public_key for node in state.nodes},
            {str(worker.worker): worker.urls for worker in state.workers if worker.urls},
        )


NO_NODES = Far({}, {})


class Addresses:
    """The latest that is known of the other nodes."""

    def __init__(self, far: Far) -> None:
        self._far = far

    def learn(self, state: PipelineState) -> None:
        self._far = Far.of(state)

    @property
    def keys(self) -> Mapping[int, bytes]:
        return self._far.keys

    def url(self, worker: WorkerId, label: str) -> str:
        """Empty while the worker does not run."""
        return self._far.urls.get(str(worker), {}).get(label, "")


class FarSite:
    """The workers of one other node, or its carrier, which takes their place."""

    follows_epochs = True
    is_authenticated = False  # the binder authenticates this worker, and not the other way round

    def __init__(self, spec: NodeSpec, node: int, addresses: Addresses, is_carried: bool) -> None:
        self._own, self._node, self._addresses = spec.own, node, addresses
        self._is_carried = is_carried
        self.name = f"node {node}"

    def open(self, context: Any) -> None:
        pass

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str:
        """Empty while the worker does not run, or its node has not joined."""
        return self._addresses.url(self.peer(edge, rank), label_of(edge, rank)) if self.is_joined else ""

    @property
    def is_joined(self) -> bool:
        return self._node in self._addresses.keys

    def peer(self, edge: Edge, rank: int) -> WorkerId:
        """Whose address it is."""
        return WorkerId(Role.CARRIER, self._node) if self._is_carried else WorkerId(edge.binder, rank)

    def prepare(self, socket: Any) -> None:
        set_tcp_options(socket)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        if (key := self._addresses.keys.get(self._node)) is not None:
            socket.curve_serverkey = key
            socket.curve_publickey, socket.curve_secretkey = self._own.public, self._own.secret

    def close(self) -> None:
        pass


class _Authenticator(ThreadAuthenticator):
    """Leaves whoever is refused without an answer, so that its handshake is tried again.

    A worker that starts learns of nodes that join meanwhile only when it has loaded its weights. After status
    400 the ends of their workers would never connect again, and their queues would count as full.
    """

    def _send_zap_reply(
        self, request_id: bytes, status_code: bytes, status_text: bytes, user_id: str = "anonymous"
    ) -> None:
        code = b"300" if status_code == b"400" else status_code
        super()._send_zap_reply(request_id, code, status_text, user_id)


class Doors:
    """The edges that this process binds for the workers of other nodes, at sockets that listen already."""

    def __init__(
        self, own: KeyPair, descriptors: Mapping[str, int], is_known: Callable[[bytes], bool]
    ) -> None:
        """`descriptors`: by label. `is_known`: whether a public key is that of a node."""
        self._own, self._descriptors, self._is_known = own, dict(descriptors), is_known
        self._authenticator: _Authenticator | None = None
        self.num_refused = 0  # connections

    def open(self, context: Any) -> None:
        if self._descriptors:
            self._authenticator = _Authenticator(context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(DOMAIN, self)

    def callback(self, domain: str, public: bytes) -> bool:
        """Called by the authenticator with the public key of whoever connects."""
        if self._is_known(public):
            return True
        self.num_refused += 1
        if not self.num_refused & (self.num_refused - 1):  # it comes again and again
            logger.warning("a connection with a key of no node was refused (%d so far)", self.num_refused)
        return False

    def has(self, label: str) -> bool:
        return label in self._descriptors

    def descriptor(self, label: str) -> int:
        return self._descriptors[label]

    def bind(self, zmq_socket: Any, label: str) -> None:
        """`zmq_socket`: new, with no options of a site."""
        descriptor = self._descriptors[label]
        set_tcp_options(zmq_socket)
        zmq_socket.curve_server = True
        zmq_socket.curve_publickey, zmq_socket.curve_secretkey = self._own.public, self._own.secret
        zmq_socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
        zmq_socket.setsockopt(zmq.USE_FD, descriptor)
        zmq_socket.bind(url_of(descriptor))

    def close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()


class Cluster:
    """The sites of one worker: far ones by node, and its own doors."""

    def __init__(self, spec: NodeSpec, descriptors: Sequence[int], role: Role = Role.CLIENT) -> None:
        """`role`: of the worker."""
        self.spec, self._role = spec, role
        self.addresses = Addresses(Far(spec.keys, spec.urls))
        self.doors = Doors(
            spec.own,
            dict(zip(spec.doors, descriptors, strict=True)),
            lambda public: public in self.addresses.keys.values(),
        )
        self._far: dict[tuple[int, bool], FarSite] = {}

    def site_of(self, edge: Edge, rank: int) -> FarSite | None:
        """None for an edge within this node."""
        if edge.binder is Role.LAUNCHER:
            return None
        node = self.spec.node_of(WorkerId(edge.binder, rank))
        if node == self.spec.node:
            return None
        is_carried = CARRIED.get(edge) is self._role
        site = FarSite(self.spec, node, self.addresses, is_carried)
        return self._far.setdefault((node, is_carried), site)


def url_of(descriptor: int) -> str:
    """The tcp address of a socket that listens."""
    with socket.socket(fileno=socket.dup(descriptor)) as listening:
        host, port = listening.getsockname()[:2]
    return tcp_url(host, port)


def listen_at(address: str, ports: Iterable[int] = ()) -> socket.socket:
    """A socket that listens at the first free one of `ports`; without any, at a free port.

    Raises OSError that names them.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    choice = list(ports)
    for port in choice or [0]:
        try:
            return socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            last = error
    where = f"ports {choice[0]} to {choice[-1]}" if choice else "any port"
    raise OSError(f"cannot listen at {address}, {where}: {last.strerror}")
