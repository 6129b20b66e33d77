"""Keys, and tcp edges that only serve who has one."""

from __future__ import annotations

import contextlib
import socket as sockets_of_the_system
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.transport.keys import ClientKeys, ServerKeys, make_client_keys, make_server_keys, owner_of
from pipeline.transport.sites import EdgeEnd
from pipeline.transport.sockets import Sockets
from pipeline.transport.tcp import ClientListener, RemotePipeline
from pipeline.wire.clients import Hello, TokenOutputs
from pipeline.wire.control import PipelineState, WorkerState
from pipeline.wire.encoding import LeaseReleased
from pipeline.wire.topology import CONTROL, DIRECT_EDGES, ENCODE, FEEDBACK, INGEST, OUTPUTS
from tests.fakes import LLM_0, PREPROCESS, VIT_0
from tests.waiting import wait_for
from tools.processes import free_port


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_server_keys(tmp_path / "keys")
    return tmp_path / "keys"


class Site(NamedTuple):
    door: ClientListener
    outside: Sockets
    connect: Callable[[Path], Sockets]
    keys: Path


@pytest.fixture
def site(keys: Path) -> Iterator[Site]:
    port = free_port(len(DIRECT_EDGES))
    door = ClientListener("127.0.0.1", port, ServerKeys.read(keys))
    made = [Sockets(door, {})]

    def connect(folder: Path) -> Sockets:
        made.append(Sockets(RemotePipeline(f"tcp://127.0.0.1:{port}", ClientKeys.read(folder)), {}))
        return made[-1]

    yield Site(door, made[0], connect, keys)
    for sockets in reversed(made):
        sockets.close()


def test_secret_keys_are_for_their_owner_only(keys: Path) -> None:
    given = make_client_keys(keys, "alice")
    assert sorted(path.name for path in given.iterdir()) == ["client.key", "client.key_secret", "server.key"]
    for path in (keys, given, keys / "server.key_secret", given / "client.key_secret"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert ClientKeys.read(given).server == ServerKeys.read(keys).own.public
    assert ServerKeys.read(keys).client_name(ClientKeys.read(given).own.public) == "alice"
    assert "secret-key" not in (keys / "clients" / "alice.key").read_text()


def test_keys_are_never_overwritten(keys: Path) -> None:
    before = ServerKeys.read(keys).own
    with pytest.raises(FileExistsError, match="keys of a server already"):
        make_server_keys(keys)
    given = make_client_keys(keys, "alice")
    with pytest.raises(FileExistsError, match="alice has keys already"):
        make_client_keys(keys, "alice")
    assert ServerKeys.read(keys).own == before
    assert ClientKeys.read(given)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_files_is_refused(keys: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        make_client_keys(keys, name)


def test_what_is_missing_is_named(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(ValueError, match="no folder of clients' keys"):
        ServerKeys.read(tmp_path)
    with pytest.raises(ValueError, match=r"client\.key_secret"):
        ClientKeys.read(tmp_path)
    (keys / "server.key_secret").write_text((keys / "server.key").read_text())
    with pytest.raises(ValueError, match="holds no secret key"):
        ServerKeys.read(keys)


def test_the_tool_makes_keys_and_explains_what_is_wrong(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tools.keys", *arguments], capture_output=True, text=True, timeout=30
        )

    keys = str(tmp_path / "keys")
    assert "no folder of clients' keys" in run("client", keys, "alice").stderr
    assert run("server", keys).returncode == 0
    assert str(tmp_path / "keys" / "for-alice") in run("client", keys, "alice").stdout
    again = run("client", keys, "alice")
    assert (again.returncode, again.stderr) == (1, "alice has keys already\n")


@pytest.mark.parametrize("url", ["tcp://", "tcp://host", "tcp://host:port", "http://host:1"])
def test_an_address_that_is_none_is_refused(keys: Path, url: str) -> None:
    client = ClientKeys.read(make_client_keys(keys, "alice"))
    with pytest.raises(ValueError, match="is not tcp://HOST:PORT"):
        RemotePipeline(url, client)


def test_edges_of_one_process_may_be_at_several_sites(keys: Path, tmp_path: Path) -> None:
    """Preprocess takes requests from another machine, and tells a ViT of this one."""
    port = free_port(len(DIRECT_EDGES))
    epochs = {PREPROCESS: 1, VIT_0: 1}
    listener = ClientListener("127.0.0.1", port, ServerKeys.read(keys))
    preprocess = Sockets(tmp_path, epochs, elsewhere={EdgeEnd(INGEST): listener})
    vit = Sockets(tmp_path, epochs)
    client_keys = ClientKeys.read(make_client_keys(keys, "alice"))
    client = Sockets(RemotePipeline(f"tcp://127.0.0.1:{port}", client_keys), {})
    try:
        ingest, feedback = preprocess.receiver(INGEST), preprocess.receiver(FEEDBACK)
        encode = vit.receiver(ENCODE)
        hello = Hello(client_id=b"c" * 16, protocol=1)
        client.sender(INGEST).send(hello)
        received = wait_for(ingest.receive)
        assert (received.message, received.user) == (hello, client_keys.own.public.decode())
        released = LeaseReleased(sender=LLM_0, epoch=1, lease_ids=(7,))
        to_vit = preprocess.sender(ENCODE)
        to_vit.send(released)
        assert wait_for(encode.receive).message == released
        assert feedback.receive() is None
        assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_socket()] == [
            "encode.0.1",
            "feedback.1",
        ]
        # Only what is in the run directory has another address for a successor.
        states = tuple(WorkerState(worker, 2, is_ready=True) for worker in (VIT_0, PREPROCESS))
        assert preprocess.follow(PipelineState(workers=states)) == [VIT_0, PREPROCESS]
        successor = Sockets(tmp_path, {VIT_0: 2})
        at_successor = successor.receiver(ENCODE)
        to_vit.send(released)
        assert wait_for(at_successor.receive).message == released
        successor.close()
    finally:
        for sockets in (client, vit, preprocess):
            sockets.close()


def test_messages_tell_whose_they_are(site: Site) -> None:
    given = make_client_keys(site.keys, "alice")  # while the server runs
    ingest = site.outside.receiver(INGEST)
    site.connect(given).sender(INGEST).send(Hello(client_id=b"c" * 16, protocol=1), [b"frame"])
    received = wait_for(ingest.receive)
    assert received.message == Hello(client_id=b"c" * 16, protocol=1)
    assert [bytes(frame) for frame in received.frames] == [b"frame"]
    assert received.user.encode() == ClientKeys.read(given).own.public


def test_subscriptions_tell_whose_they_are(site: Site) -> None:
    alice, bob = (make_client_keys(site.keys, name) for name in ("alice", "bob"))
    topic = owner_of(ClientKeys.read(alice).own.public) + b"12345678"
    outputs = site.outside.publisher(OUTPUTS, lambda topic, user: topic.startswith(owner_of(user)))
    reader, spy = site.connect(alice), site.connect(bob)
    reading = reader.subscriber(OUTPUTS, topic)
    assert wait_for(outputs.subscriptions) == [(topic, True)]
    spying = spy.subscriber(OUTPUTS, topic)
    wait_for(lambda: outputs.subscriptions() or outputs.num_refused)
    assert outputs.num_refused == 1
    assert outputs.publish(TokenOutputs(outputs=(), sender=LLM_0, epoch=1), topic)
    assert wait_for(reading.receive)
    assert spying.receive() is None
    spying.close()  # who leaves is not said: it must not pass for alice
    time.sleep(0.2)
    assert outputs.subscriptions() == []
    reading.close()
    assert wait_for(outputs.subscriptions) == [(topic, False)]


def test_a_stranger_and_who_was_removed_are_refused_and_counted(site: Site, tmp_path: Path) -> None:
    make_server_keys(tmp_path / "other")
    stranger, removed = make_client_keys(tmp_path / "other", "eve"), make_client_keys(site.keys, "bob")
    (stranger / "server.key").write_text((site.keys / "server.key").read_text())
    (site.keys / "clients" / "bob.key").unlink()
    (site.keys / "clients" / "broken.key").write_text("no key")
    ingest = site.outside.receiver(INGEST)
    for number, folder in enumerate((stranger, removed), 1):
        site.connect(folder).sender(INGEST).send(Hello(client_id=b"c" * 16, protocol=1))
        wait_for(lambda number=number: site.door.num_refused >= number)
    given = make_client_keys(site.keys, "alice")
    site.connect(given).sender(INGEST).send(Hello(client_id=b"a" * 16, protocol=1))
    assert wait_for(ingest.receive).message.client_id == b"a" * 16, "nothing of the others came before"


def test_a_client_with_another_servers_key_gets_nothing(site: Site, tmp_path: Path) -> None:
    given = make_client_keys(site.keys, "alice")
    make_server_keys(tmp_path / "other")
    (given / "server.key").write_text((tmp_path / "other" / "server.key").read_text())
    ingest, states = site.outside.receiver(INGEST), site.outside.publisher(CONTROL)
    fooled = site.connect(given)
    state = fooled.subscriber(CONTROL)
    fooled.sender(INGEST).send(Hello(client_id=b"c" * 16, protocol=1))
    time.sleep(0.5)
    states.publish(PipelineState(workers=()))
    assert (ingest.receive(), states.subscriptions(), state.receive()) == (None, [], None)


def test_without_encryption_nothing_is_said(site: Site) -> None:
    """Plain tcp that speaks ZMTP with the NULL mechanism, or no ZMTP at all."""
    ingest = site.outside.receiver(INGEST)
    host, port = ingest.url.removeprefix("tcp://").split(":")
    signature = b"\xff" + bytes(8) + b"\x7f"
    for data in (signature + b"\x03\x00NULL" + bytes(48), b"GET / HTTP/1.1\r\n\r\n" * 100, b"\xff" * 5000):
        with sockets_of_the_system.create_connection((host, int(port)), timeout=5) as plain:
            plain.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                while plain.recv(1000):  # until it closes
                    pass
    given = make_client_keys(site.keys, "alice")
    site.connect(given).sender(INGEST).send(Hello(client_id=b"a" * 16, protocol=1))
    assert wait_for(ingest.receive)
