"""Sites over tcp, for clients on other machines: only clients with a known key (`keys.py`) are served."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from pipeline.transport.keys import ClientKeys, ServerKeys, owner_of
from pipeline.wire.topology import DIRECT_EDGES, Edge, WorkerId

logger = logging.getLogger(__name__)
DOMAIN = "clients"  # of ZAP, ZeroMQ's authentication protocol
WARNING_INTERVAL_S = 10.0
MAX_RECONNECT_MS = 1000  # between two attempts to connect; the first ones follow faster
# a connection that is silent for so long is closed: the peer's machine is gone
HEARTBEAT_MS, SILENCE_MS = 5_000, 15_000


def tcp_url(host: str, port: int) -> str:
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"


def tcp_address(host: str, port: int, edge: Edge) -> str:
    """The edges that clients use have consecutive ports."""
    return tcp_url(host, port + DIRECT_EDGES.index(edge))


def set_tcp_options(socket: Any) -> None:
    """Of every socket over tcp, before it binds or connects."""
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, SILENCE_MS)


class RemotePipeline:
    """A pipeline on another machine."""

    follows_epochs = False  # one address for all incarnations
    is_authenticated = False  # the server authenticates this client, not the other way round

    def __init__(self, url: str, keys: ClientKeys) -> None:
        """`url`: tcp://HOST:PORT. Raises ValueError for another."""
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        if not url.startswith("tcp://") or not host or not port.isdecimal():
            raise ValueError(f"{url!r} is not tcp://HOST:PORT")
        self._host, self._port, self._keys = host.strip("[]"), int(port), keys
        self.name = url

    def open(self, context: Any) -> None:
        pass

    @property
    def owner(self) -> bytes:
        return owner_of(self._keys.own.public)

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str:
        return tcp_address(self._host, self._port, edge)

    def prepare(self, socket: Any) -> None:
        set_tcp_options(socket)
        socket.curve_serverkey = self._keys.server
        socket.curve_publickey, socket.curve_secretkey = self._keys.own.public, self._keys.own.secret

    def close(self) -> None:
        pass


class ClientListener:
    """The tcp addresses at which this process serves clients."""

    follows_epochs = False
    is_authenticated = True  # each message carries its sender's public key

    def __init__(self, host: str, port: int, keys: ServerKeys) -> None:
        self._host, self._port, self._keys = host, port, keys
        self.name = f"tcp://{host}:{port}"
        self.num_refused = 0  # connections
        self._warned_at = -math.inf

    def open(self, context: Any) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, self)

    def callback(self, domain: str, public: bytes) -> bool:
        """Called by the authenticator with the public key of a connecting client."""
        if (name := self._keys.client_name(public)) is None:
            self.num_refused += 1
            if (now := time.monotonic()) - self._warned_at > WARNING_INTERVAL_S:  # refused clients reconnect
                self._warned_at = now
                logger.warning(
                    "a client with an unknown key was refused (%d connections so far)", self.num_refused
                )
            return False
        logger.debug("client %s has connected", name)
        return True

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str:
        return tcp_address(self._host, self._port, edge)

    def prepare(self, socket: Any) -> None:
        set_tcp_options(socket)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._keys.own.public, self._keys.own.secret
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())

    def close(self) -> None:
        self._authenticator.stop()
