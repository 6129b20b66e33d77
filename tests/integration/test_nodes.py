"""A pipeline over several nodes: launchers that join, run workers, leave, die, and lose their links."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.client.client import PipelineClient
from pipeline.transport.poller import Poller
from pipeline.transport.sockets import Sockets
from pipeline.wire.prompts import ChatMessage
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import CONTROL
from tests.nodes import Cluster, Node, namespaces
from tests.servers import Server, wait_until_dead
from tools.local_nodes import metrics, wait_until_all_serve
from tools.namespaces import set_link
from tools.processes import workers_of

QUICK = ("--node-timeout", "2", "--kv-cache-gib", "0.1", "--max-model-len", "1024")
LOOPBACK = ("127.0.0.1", "127.0.0.2")


class Pair(NamedTuple):
    cluster: Cluster
    head: Server
    node: Node


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    cluster = Cluster(tmp_path_factory.mktemp("nodes"), LOOPBACK, *QUICK)
    with cluster.head() as head, cluster.node(1) as node:
        wait_until_all_serve(head.url, 2)
        yield Pair(cluster, head, node)


def ask(head: Server, number: int, num_tokens: int = 40) -> str:
    answer = (
        head.client()
        .with_options(timeout=200)
        .chat.completions.create(
            model="embedded-shapes",
            messages=[{"role": "user", "content": f"Count to {number}."}],
            max_tokens=num_tokens,
            temperature=0,
            seed=1,
            extra_body={"ignore_eos": True},
        )
    )
    return answer.choices[0].message.content or ""


def ask_many(head: Server, count: int = 8, num_tokens: int = 40) -> list[str]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda number: ask(head, number, num_tokens), range(count)))


def answered_by(head: Server, rank: int) -> int:
    """Prompt tokens that a group has computed."""
    line = next(
        line for line in metrics(head.url).splitlines() if f'prompt_tokens_total{{engine="{rank}"' in line
    )
    return int(float(line.rpartition(" ")[2]))


def test_both_groups_answer_and_say_what_one_says(pair: Pair) -> None:
    alone = [ask(pair.head, number) for number in range(8)]
    before = answered_by(pair.head, 1)
    assert ask_many(pair.head) == alone
    end = time.monotonic() + 20
    while answered_by(pair.head, 1) == before:
        assert time.monotonic() < end, "the other node's group has answered nothing"
        ask_many(pair.head)


def test_clients_in_the_run_directory_reach_all_groups(pair: Pair) -> None:
    async def texts() -> list[str]:
        async with PipelineClient(pair.head.run_dir) as client:
            assert client.leads == (0, 1)
            return await asyncio.gather(*(text_of(client, number) for number in range(8)))

    async def text_of(client: PipelineClient, number: int) -> str:
        sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        message = ChatMessage("user", f"Count to {number}.")
        return "".join([piece.text async for piece in client.generate([message], sampling)])

    alone = [ask(pair.head, number) for number in range(8)]
    before = answered_by(pair.head, 1)
    assert asyncio.run(texts()) == alone
    end = time.monotonic() + 20
    while answered_by(pair.head, 1) == before:
        assert time.monotonic() < end, "the other node's group has answered nothing"
        asyncio.run(texts())


def listening(session: int) -> set[tuple[str, int]]:
    """Addresses and ports at which processes of a session listen."""
    inodes = set()
    for pid in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(pid.name)) == session:
                inodes |= {os.readlink(fd) for fd in (pid / "fd").iterdir()}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                host, _, port = fields[1].partition(":")
                words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]
                address = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
                found.add((address, int(port, 16)))
    return found


def mechanism_at(address: tuple[str, int]) -> bytes:
    """Of ZMTP: what a listener says of its security to whoever connects."""
    with socket.create_connection(address, 20) as connection:
        connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
        greeting = b""
        while len(greeting) < 32 and (data := connection.recv(64)):
            greeting += data
        return greeting[12:32].rstrip(b"\0")


def test_a_port_scan_finds_curve_and_http(pair: Pair) -> None:
    http = int(pair.head.url.rpartition(":")[2])
    at_head, at_node = (listening(launcher.process.pid) for launcher in (pair.head, pair.node))
    assert {host for host, _ in at_head} == {"127.0.0.1"}, "nothing listens on every interface"
    assert {host for host, _ in at_node} == {"127.0.0.2"}
    found = {address: mechanism_at(address) for address in at_head | at_node if address[1] != http}
    assert len(found) >= 8, "two of launchers, two of preprocess and the endpoint, and those of LLMs and ViTs"
    assert set(found.values()) == {b"CURVE"}, found


def test_launchers_are_quiet_while_nothing_happens(pair: Pair) -> None:
    """Each report is acknowledged, and no acknowledgement is reported."""
    sockets = Sockets(pair.head.run_dir, {})
    states = sockets.subscriber(CONTROL)
    num_states, end = 0, time.monotonic() + 3
    while time.monotonic() < end:
        Poller(states).wait(0.1)
        while states.receive() is not None:
            num_states += 1
    sockets.close()
    assert 3 <= num_states < 40, "a state a second, and one for each of four reports"


def test_a_worker_of_a_node_dies_and_no_request_is_lost(pair: Pair) -> None:
    whole = ask_many(pair.head, num_tokens=100)
    pids = workers_of(pair.node.process.pid)
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(ask_many, pair.head, 8, 100)
        time.sleep(0.5)
        os.kill(pids["llm.1"], signal.SIGKILL)
        assert answers.result() == whole
    pair.head.wait_for("llm.1 serves again")
    pair.node.children = workers_of(pair.node.process.pid)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--max-model-len", "512"), "max_model_len is 512 there and 1024 at the head"),
        (("--node-rank", "1", "--tp", "2"), "tp is 2 there and 1 at the head"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(options: tuple[str, ...], sentence: str, pair: Pair) -> None:
    with pair.cluster.node(1, *options, expects_failure=True) as refused:
        assert refused.wait() == 1
    assert sentence in refused.output


def test_a_node_with_another_token_is_refused(pair: Pair, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("f" * 64)
    token.chmod(0o600)
    with pair.cluster.node(1, token=token, expects_failure=True) as refused:
        assert refused.wait() == 1
    assert "does not accept the token" in refused.output


def test_a_node_leaves_when_its_requests_are_finished_and_joins_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, LOOPBACK, *QUICK)
    with cluster.head() as head:
        whole = ask_many(head, num_tokens=100)
        with cluster.node(1) as node:
            wait_until_all_serve(head.url, 2)
            with ThreadPoolExecutor(1) as thread:
                answers = thread.submit(ask_many, head, 8, 100)
                time.sleep(0.3)
                assert node.stop() == 0
                assert answers.result() == whole
            assert "wants to leave" in head.output
            head.wait_for("node 1 has ended")
            assert "it is replaced" not in head.output, "nothing has died"
        assert ask_many(head, num_tokens=100) == whole
        with cluster.node(1):
            wait_until_all_serve(head.url, 2)
            assert ask_many(head, num_tokens=100) == whole


def test_a_launcher_is_killed_and_no_request_is_lost(tmp_path: Path) -> None:
    """Its workers die with it, and its witness tells the head: nobody waits for the node's silence."""
    cluster = Cluster(tmp_path, LOOPBACK, *QUICK, "--node-timeout", "60")
    with cluster.head() as head:
        whole = ask_many(head, num_tokens=100)
        with cluster.node(1, expects_failure=True) as node:
            node.wait_for("has joined")
            wait_until_all_serve(head.url, 2)
            workers_of_dead = workers_of(node.process.pid)
            with ThreadPoolExecutor(1) as thread:
                answers = thread.submit(ask_many, head, 8, 100)
                time.sleep(0.3)
                node.process.kill()
                assert wait_until_dead(workers_of_dead, 10) == []
                assert answers.result() == whole
            for left in node.run_dir.iterdir():  # nobody could
                left.unlink()
        head.wait_for("node 1 has ended", 5)
        with cluster.node(1):
            wait_until_all_serve(head.url, 2)
            assert ask_many(head, num_tokens=100) == whole


def test_a_link_is_cut_no_request_is_lost_and_the_node_is_used_again(tmp_path: Path) -> None:
    with namespaces(2) as (addresses, insides):
        cluster = Cluster(tmp_path, addresses, *QUICK, insides=insides)
        with cluster.head("--host", addresses[0]) as head, cluster.node(1) as node:
            wait_until_all_serve(head.url, 2)
            whole = ask_many(head, num_tokens=100)
            with ThreadPoolExecutor(1) as thread:
                answers = thread.submit(ask_many, head, 8, 100)
                time.sleep(0.3)
                set_link(insides[1], is_up=False)
                node.wait_for("all workers of this node are killed")
                head.wait_for("node 1 is lost")
                assert answers.result() == whole
            assert set(workers_of(node.process.pid)) == {"server"}, "a fenced node has no workers"
            set_link(insides[1], is_up=True)
            node.wait_for("node 1 has joined", count=2)
            head.wait_for("llm.1 is ready", count=2)
            assert ask_many(head, num_tokens=100) == whole
            node.children = workers_of(node.process.pid)


@pytest.mark.timeout(300)
def test_a_small_soak_with_kills_on_both_nodes() -> None:
    """At full size: `python -m tools.soak_nodes --nnodes 3 --minutes 10`."""
    options = (
        "--nnodes 2 --kills 6 --streams 4 --chats 4 --clients 2 --output-tokens 30 --interval 0.3 --cut 3 "
        "--victims llm.1 vit.1 carrier.0 preprocess.0 launcher link --node-timeout 2"
    )
    soak = subprocess.run(
        [sys.executable, "-m", "tools.soak_nodes", *options.split()],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert soak.returncode == 0, soak.stdout + soak.stderr
    found = json.loads(soak.stdout[: soak.stdout.index("\n}") + 2])
    assert found["answers"] > 10
    assert sum(found["kills"].values()) == 6


def test_a_group_over_two_nodes_says_the_same_and_is_lost_together(tmp_path: Path) -> None:
    options = ("--tp", "2", "--nodes-per-group", "2", "--trusted-network", "--vit", "1")
    cluster = Cluster(tmp_path, LOOPBACK, *QUICK, *options)
    with Server("--tp", "2", *QUICK[2:]) as alone:
        whole = ask_many(alone, 4)
    with cluster.waiting_head() as head, cluster.node(1) as node:
        head.wait_until_serving()
        assert ask_many(head, 4) == whole
        in_the_clear = [
            (host, port)
            for launcher in (head, node)
            for host, port in listening(launcher.process.pid)
            if host not in LOOPBACK
        ]
        assert in_the_clear == [], "what gloo opens is at the nodes' addresses, too"
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(ask_many, head, 4)
            os.kill(workers_of(node.process.pid)["llm.1"], signal.SIGKILL)
            assert answers.result() == whole
        head.wait_for("llm.0 to 1 serves again")
        node.children = workers_of(node.process.pid)
