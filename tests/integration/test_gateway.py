"""Clients on other machines: over tcp, with keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from pipeline.client.blocking import BlockingClient
from pipeline.transport.keys import ClientKeys, make_client_keys, make_server_keys
from pipeline.transport.tcp import RemotePipeline
from pipeline.wire.clients import PROTOCOL_VERSION, AbortRequest, Hello
from pipeline.wire.errors import PipelineError, RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import DIRECT_EDGES, INGEST, OUTPUTS
from tests.integration.test_direct import request_line
from tests.pictures import encode, scene
from tests.servers import Server
from tools.processes import free_port, workers_of

GREEDY = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
CHAT = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]


class Served(NamedTuple):
    server: Server
    url: str
    keys: Path  # of a client

    def client(self) -> BlockingClient:
        return BlockingClient(self.url, self.keys)

    def metrics(self, worker: str = "gateway.0") -> dict[str, float]:
        with urllib.request.urlopen(f"{self.server.url}/metrics") as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        return {
            sample.name.removeprefix("vlm_").removesuffix("_total"): sample.value
            for sample in samples
            if sample.labels["worker"] == worker
        }

    def wait_for(self, name: str, least: float) -> None:
        end = time.monotonic() + 10
        while self.metrics().get(name, 0) < least:
            assert time.monotonic() < end, self.metrics()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("curve")
    keys, port = folder / "keys", free_port(len(DIRECT_EDGES))
    make_server_keys(keys)
    client = make_client_keys(keys, "alice")
    make_client_keys(keys, "bob")
    with Server(
        "--dtype", "float32", "--vit", "1", "--direct-port", str(port), "--direct-keys", str(keys)
    ) as server:
        yield Served(server, f"tcp://127.0.0.1:{port}", client)


def ask(client: BlockingClient, number: int, begun: threading.Event | None = None) -> tuple[int, ...]:
    """`begun` is set when the first token has come."""
    tokens: tuple[int, ...] = ()
    for piece in client.generate(CHAT, GREEDY, [encode(scene(number))]):
        tokens += tuple(piece.token_ids)
        if begun is not None:
            begun.set()
    return tokens


def num_resubmitted(client: BlockingClient) -> int:
    assert client._client is not None
    return client._client.counters["resubmitted"]


def test_over_tcp_comes_what_comes_over_the_run_directory(served: Served) -> None:
    with (
        BlockingClient(served.server.run_dir) as here,
        served.client() as there,
        served.client() as also,
        ThreadPoolExecutor(4) as threads,
    ):
        expected = [ask(here, number) for number in range(2)]
        answers = list(threads.map(lambda number: ask((there, also)[number % 3 == 0], number % 2), range(8)))
        assert answers == expected * 4
    served.wait_for("relayed_messages", 8)


def test_two_keys_share_neither_names_nor_caches(served: Served) -> None:
    """What alice calls "logo" is hers: bob's own "logo" is his, and without one he is told nothing."""

    def tell(client: BlockingClient, media: list[bytes], uuid: str) -> str:
        part = ImagePart(frame=0 if media else -1, uuid=uuid)
        chat = [ChatMessage("user", (part, TextPart("What is in the picture?")))]
        return "".join(piece.text for piece in client.generate(chat, GREEDY, media))

    with served.client() as alice, BlockingClient(served.url, served.keys.parent / "for-bob") as bob:
        of_alice = tell(alice, [encode(scene(1))], "logo")
        expected = tell(bob, [encode(scene(2))], "")
        assert expected != of_alice, "the pictures are told apart"
        with pytest.raises(RequestError, match="nothing is known"):
            tell(bob, [], "logo")
        assert tell(bob, [encode(scene(2))], "logo") == expected
        assert tell(alice, [], "logo") == of_alice
        with served.client() as also_alice:
            assert tell(also_alice, [], "logo") == of_alice, "one key is one tenant"


def test_the_tools_work_over_tcp(served: Served, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(request_line(number) + "\n" for number in range(4)))
    there = ["--url", served.url, "--keys", str(served.keys)]
    subprocess.run(
        [sys.executable, "-m", "tools.batch", *there, str(source), str(target)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert [json.loads(line)["response"]["status_code"] for line in target.read_text().splitlines()] == [
        200
    ] * 4
    done = subprocess.run(
        [sys.executable, "-m", "tools.submit", *there, "Hello"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "output tokens]" in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "tools.submit", *there[:2], "Hello"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (wrong.returncode, "takes keys" in wrong.stderr) == (1, True)


def test_wrong_keys_are_refused_and_counted(served: Served, tmp_path: Path) -> None:
    make_server_keys(tmp_path / "other")
    stranger = make_client_keys(tmp_path / "other", "eve")
    with pytest.raises(PipelineError, match="server's key right"):
        BlockingClient(served.url, stranger).start(0.5)
    (stranger / "server.key").write_text((served.keys / "server.key").read_text())
    with pytest.raises(PipelineError, match="is the client's key known there"):
        BlockingClient(served.url, stranger).start(0.5)
    served.wait_for("refused_connections", 1)


def test_another_tokenizer_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be read: give the client a model_folder"):
        BlockingClient(served.url, served.keys, tmp_path).start(5)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PipelineError, match="is not the tokenizer of the server's model"):
        BlockingClient(served.url, served.keys, tmp_path).start(5)


def test_garbage_and_forged_ids_are_refused_and_counted(served: Served) -> None:
    """What a client with a key can do that does not keep to the protocol."""
    remote = RemotePipeline(served.url, ClientKeys.read(served.keys))
    context = zmq.Context()
    try:
        push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
        for socket, edge in ((push, INGEST), (sub, OUTPUTS)):
            remote.prepare(socket)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(remote.url(edge, {}))
        before = served.metrics()
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.setsockopt(zmq.SUBSCRIBE, b"f" * 16)
        push.send(b"\xc1garbage")
        push.send(msgspec.msgpack.encode(Hello(client_id=b"f" * 16, protocol=PROTOCOL_VERSION)))
        push.send(msgspec.msgpack.encode(AbortRequest(client_id=b"", request_id="r", attempt=1)))
        served.wait_for("refused_messages", before["refused_messages"] + 1)
        served.wait_for("refused_client_ids", before["refused_client_ids"] + 2)
        served.wait_for("refused_subscriptions", before["refused_subscriptions"] + 2)
        push.send(bytes(80 << 20))  # above the limit: the connection is closed, and nothing is kept
        time.sleep(0.5)
    finally:
        context.destroy(linger=0)
    with served.client() as client:
        assert ask(client, 1)
    assert served.metrics()["worker_restarts"] == before["worker_restarts"]


def test_the_gateway_dies_and_no_stream_has_a_gap(served: Served) -> None:
    with (
        BlockingClient(served.server.run_dir) as here,
        served.client() as there,
        ThreadPoolExecutor(4) as threads,
    ):
        expected = [ask(here, number) for number in range(4)]
        restarts = served.metrics()["worker_restarts"]
        for kill in range(3):
            begun = threading.Event()
            answers = [threads.submit(ask, there, number, begun) for number in range(4)]
            assert not kill or begun.wait(30)  # the first kill meets prompts on their way
            os.kill(workers_of(served.server.process.pid)["gateway.0"], signal.SIGKILL)
            assert [answer.result(timeout=30) for answer in answers] == expected
        served.wait_for("worker_restarts", restarts + 3)
        assert num_resubmitted(there) >= 3, "the kills came while streams ran"
    served.server.children = workers_of(served.server.process.pid)


def test_other_workers_die_and_no_stream_over_tcp_has_a_gap(served: Served) -> None:
    with (
        BlockingClient(served.server.run_dir) as here,
        served.client() as there,
        ThreadPoolExecutor(4) as threads,
    ):
        expected = [ask(here, number) for number in range(4)]
        for victim in ("preprocess.0", "llm.0", "vit.0"):
            begun = threading.Event()
            answers = [threads.submit(ask, there, number, begun) for number in range(4)]
            assert victim == "preprocess.0" or begun.wait(30)
            os.kill(workers_of(served.server.process.pid)[victim], signal.SIGKILL)
            assert [answer.result(timeout=30) for answer in answers] == expected
        assert num_resubmitted(there) >= 3, "the kills came while streams ran"
    served.server.children = workers_of(served.server.process.pid)


def test_a_client_process_that_is_killed_is_missed(served: Served) -> None:
    child = (
        "import sys\nfrom pipeline.client.blocking import BlockingClient\nfrom pipeline.wire.prompts "
        "import ChatMessage\n"
        "from pipeline.wire.sampling import SamplingParams\nclient = BlockingClient(sys.argv[1], "
        "sys.argv[2])\nclient.start()\n"
        "for piece in client.generate([ChatMessage('user', 'Hello')], SamplingParams(max_tokens=900, "
        "ignore_eos=True)): print('piece', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", child, served.url, str(served.keys)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "piece\n"
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while True:
        open_requests = served.metrics("llm.0")["open_requests"]
        if open_requests == 0 and served.metrics()["clients"] == 0:
            break
        assert time.monotonic() < end, (open_requests, served.metrics())
        time.sleep(0.1)
