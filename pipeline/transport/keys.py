"""CURVE keys of a server and its clients on other machines.

A server's folder holds its own key pair and, in `clients`, the public key of each client that it serves, read
at every connection. A client's folder holds its own pair and the server's public key. `tools/keys.py` makes
both. These connections are encrypted, and both ends prove possession of their secret keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq.auth

from pipeline.wire.clients import CLIENT_ID_BYTES

SERVER, CLIENT, CLIENTS = "server", "client", "clients"  # names of files and folders
OWNER_BYTES = CLIENT_ID_BYTES // 2  # a client id begins with a hash of the public key; the rest is random


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
        """The client that has this public key; None for an unknown key. Unreadable files are skipped."""
        for path in sorted((self.folder / CLIENTS).glob("*.key")):
            with contextlib.suppress(ValueError):
                if _read_public(path) == public:
                    return path.stem
        return None


def owner_of(public: bytes | str) -> bytes:
    """The prefix of the client ids that belong to this key."""
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
    """New files are readable by their owner only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_server_keys(folder: Path) -> None:
    """Raises FileExistsError when there is a pair already, which clients may trust."""
    with _private():
        (folder / CLIENTS).mkdir(parents=True, exist_ok=True)
        if (folder / f"{SERVER}.key_secret").exists():
            raise FileExistsError(f"{str(folder)!r} has the keys of a server already")
        zmq.auth.create_certificates(folder, SERVER)


def make_client_keys(folder: Path, name: str) -> Path:
    """A pair for a client of the server whose keys are in `folder`. Returns the folder to give to the client,
    secret key included.

    Raises ValueError for a name that no file can have, or without server keys; FileExistsError for a client
    that has keys already.
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
