"""The two edges between launchers, over tcp with CURVE: reports to the head, and orders from it.

Both pairs of keys come from the token that all nodes share. So who does not know the token gets no byte
through, and a listener learns nothing; a frame that is sent a second time does not fit its place in the
connection, and ends it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from pipeline.transport.keys import KeyPair
from pipeline.transport.tcp import set_tcp_options, tcp_url
from pipeline.wire.topology import NODE_EDGES, Edge, WorkerId

logger = logging.getLogger(__name__)
DOMAIN = "launchers"  # of ZAP, ZeroMQ's authentication protocol
MIN_TOKEN_BYTES, MAX_TOKEN_BYTES = 16, 4096
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def read_token(path: Path) -> bytes:
    """Raises ValueError for a file that cannot be read, that others may read, or with too short a token."""
    try:
        # A secret that Kubernetes mounts is read-only, with a mode that its pod cannot change.
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) and os.access(path, os.W_OK):
            raise ValueError(f"node_token_file {str(path)!r} is open to other users: chmod 600 closes it")
        token = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"node_token_file {str(path)!r} cannot be read: {error.strerror}") from None
    if not MIN_TOKEN_BYTES <= len(token) <= MAX_TOKEN_BYTES:
        raise ValueError(
            f"node_token_file {str(path)!r} holds {len(token)} characters: at least {MIN_TOKEN_BYTES} are "
            "needed, and random ones, such as of `openssl rand -hex 32`"
        )
    return token


def new_keys() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


def keys_of(token: bytes, name: bytes) -> KeyPair:
    """The pair of the head, or of the other launchers. The secret key is a hash of the token, as long as a
    key; any such number is one."""
    secret = z85.encode(hashlib.blake2b(token, digest_size=32, person=name).digest())
    return KeyPair(zmq.curve_public(secret), secret)


class LaunchersKeys:
    def __init__(self, token: bytes) -> None:
        self.head, self.others = keys_of(token, b"head"), keys_of(token, b"node")


class _Port:
    """What the two ends have in common."""

    follows_epochs = False  # one address for all launchers
    is_authenticated = False  # whoever is connected knows the token

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.name = f"{host}:{port}"

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str:
        return tcp_url(self._host, self._port + NODE_EDGES.index(edge))


class JoinListener(_Port):
    """The head's end."""

    def __init__(self, host: str, port: int, keys: LaunchersKeys) -> None:
        super().__init__(host, port)
        self._keys = keys

    def open(self, context: Any) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, self)

    def callback(self, domain: str, public: bytes) -> bool:
        """Called by the authenticator with the public key of a launcher that connects."""
        return public == self._keys.others.public

    def prepare(self, socket: Any) -> None:
        set_tcp_options(socket)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._keys.head.public, self._keys.head.secret
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())

    def close(self) -> None:
        self._authenticator.stop()


class HeadAddress(_Port):
    """The end of another node's launcher."""

    def __init__(self, host: str, port: int, keys: LaunchersKeys) -> None:
        super().__init__(host, port)
        self._keys = keys
        self._monitored: Any = None
        self._monitor: Any = None
        self.num_failed_handshakes = 0  # since the last one that succeeded

    def open(self, context: Any) -> None:
        pass

    def prepare(self, socket: Any) -> None:
        set_tcp_options(socket)
        socket.curve_serverkey = self._keys.head.public
        socket.curve_publickey, socket.curve_secretkey = self._keys.others.public, self._keys.others.secret
        if self._monitor is None:
            self._monitored = socket
            events = HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._monitor = socket.get_monitor_socket(events)

    def read_handshakes(self) -> None:
        """Brings `num_failed_handshakes` up to date."""
        with contextlib.suppress(zmq.Again):
            while self._monitor is not None:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
                is_good = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                self.num_failed_handshakes = 0 if is_good else self.num_failed_handshakes + 1

    def close(self) -> None:
        pass

    def stop_watching(self) -> None:
        """Before the sockets are closed."""
        if self._monitor is not None:
            self._monitored.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
