"""Clients on other machines: CURVE keys, and tcp addresses at which only who has one is served.

A server has a folder of keys: its own pair, and in `clients` the public key of each client that it serves,
read anew at every connection. A client has a folder with its own pair and the server's public key. Both are
made by `tools/keys.py`. Everything on these connections is encrypted; both ends prove that they hold the
secret key that belongs to their public one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from pipeline.wire.messages import CLIENT_ID_BYTES
from pipeline.wire.topology import DIRECT_EDGES, Edge, WorkerId

logger = logging.getLogger(__name__)
DOMAIN = "clients"  # of ZAP, ZeroMQ's authentication protocol
SERVER, CLIENT, CLIENTS = "server", "client", "clients"  # names of files and folders
OWNER_BYTES = CLIENT_ID_BYTES // 2  # a client id begins with what follows from its key; the rest is random
WARNING_INTERVAL_S = 10.0
MAX_RECONNECT_MS = 1000  # between two attempts to connect, which begin more often
# a connection that is silent for so long is closed: the machine at its other end is gone
HEARTBEAT_MS, SILENCE_MS = 5_000, 15_000


@dataclass(frozen=True, slots=True)
class KeyPair:
    """In ZeroMQ's own text form (Z85)."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class ClientKeys:
    own: KeyPair
    server: bytes  # public

    @classmethod
    def read(cls, folder: Path) -> ClientKeys:
        """Raises ValueError when something is missing."""
        return cls(_read_pair(folder / f"{CLIENT}.key_secret"), _read_public(folder / f"{SERVER}.key"))


@dataclass(frozen=True, slots=True)
class ServerKeys:
    own: KeyPair
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> ServerKeys:
        """Raises ValueError when there is no pair, or no folder of clients."""
        if not (folder / CLIENTS).is_dir():
            raise ValueError(f"{str(folder)!r} has no folder of clients' keys: see tools/keys.py")
        return cls(_read_pair(folder / f"{SERVER}.key_secret"), folder)

    def client_name(self, public: bytes) -> str | None:
        """Whose key this is now; None: nobody's. A file that cannot be read is nobody's key."""
        for path in sorted((self.folder / CLIENTS).glob("*.key")):
            with contextlib.suppress(ValueError):
                if _read_public(path) == public:
                    return path.stem
        return None


def owner_of(public: bytes | str) -> bytes:
    """How the ids of all clients with this key begin."""
    return hashlib.blake2b(
        public if isinstance(public, bytes) else public.encode(), digest_size=OWNER_BYTES
    ).digest()


def _read_pair(path: Path) -> KeyPair:
    public, secret = _load(path)
    if secret is None:
        raise ValueError(f"{str(path)!r} holds no secret key")
    return KeyPair(public, secret)


def _read_public(path: Path) -> bytes:
    return _load(path)[0]


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no key: {error}") from None


# Making keys.


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """New files are for their owner's eyes."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_server_keys(folder: Path) -> None:
    """Raises FileExistsError when there is a pair already: its clients trust that one."""
    with _private():
        (folder / CLIENTS).mkdir(parents=True, exist_ok=True)
        if (folder / f"{SERVER}.key_secret").exists():
            raise FileExistsError(f"{str(folder)!r} has the keys of a server already")
        zmq.auth.create_certificates(folder, SERVER)


def make_client_keys(folder: Path, name: str) -> Path:
    """A pair for a client of the server whose keys are in `folder`; returns the folder that the client is to
    be given, secret key and all.

    Raises ValueError for a name that is no file's or without a server, FileExistsError when the client has
    keys already.
    """
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ValueError(f"{name!r} is no name: letters, digits, '-', '_' and '.' make one")
    ServerKeys.read(folder)
    given, known = folder / f"for-{name}", folder / CLIENTS / f"{name}.key"
    if given.exists() or known.exists():
        raise FileExistsError(f"{name} has keys already")
    with _private():
        given.mkdir()
        public, _ = zmq.auth.create_certificates(given, CLIENT)
        shutil.copy(folder / f"{SERVER}.key", given)
        shutil.copy(public, known)
    return given


# Addresses.


def tcp_address(host: str, port: int, edge: Edge) -> str:
    """The edges that clients use have ports one behind the other."""
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port + DIRECT_EDGES.index(edge)}"


def _prepare(socket: Any) -> None:
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, SILENCE_MS)


class Remote:
    """A pipeline on another machine."""

    follows_epochs = False  # one address for all incarnations
    is_authenticated = False  # by us: it is the server that asks who it is

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
        _prepare(socket)
        socket.curve_serverkey = self._keys.server
        socket.curve_publickey, socket.curve_secretkey = self._keys.own.public, self._keys.own.secret

    def close(self) -> None:
        pass


class Door:
    """The tcp addresses at which this process serves clients."""

    follows_epochs = False
    is_authenticated = True  # each message tells the public key of who sent it

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
        """Called by the authenticator with the public key of who connects."""
        if (name := self._keys.client_name(public)) is None:
            self.num_refused += 1
            if (now := time.monotonic()) - self._warned_at > WARNING_INTERVAL_S:  # it tries again and again
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
        _prepare(socket)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._keys.own.public, self._keys.own.secret
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())

    def close(self) -> None:
        self._authenticator.stop()
