"""Pictures whose pixels, or whose embeddings, cross from one node to another."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.nodes import Cluster
from tests.pictures import data_url, scene
from tests.servers import Server
from tools.processes import workers_of

QUICK = ("--kv-cache-gib", "0.1", "--max-model-len", "1024")
LOOPBACK = ("127.0.0.1", "127.0.0.2")
PATIENCE_S = 60.0


def ask(head: Server, number: int, salt: str) -> str:
    """About two pictures. Requests of different salts share no prefix."""
    client = head.client().with_options(timeout=200)
    pictures = [
        {"type": "image_url", "image_url": {"url": data_url(scene(number + place))}} for place in range(2)
    ]
    answer = client.chat.completions.create(
        model="embedded-shapes",
        messages=[{"role": "user", "content": [*pictures, {"type": "text", "text": "What is it?"}]}],  # type: ignore[list-item, misc]
        max_tokens=8,
        temperature=0,
        extra_body={"cache_salt": salt, "ignore_eos": True},
    )
    return answer.choices[0].message.content or ""


def ask_many(head: Server, salt: str, count: int = 4) -> list[str]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda number: ask(head, number, salt), range(count)))


def copies(head: Server, node: int) -> int:
    """Tensors that a node's carrier has copied, as it has reported so far."""
    with urllib.request.urlopen(f"{head.url}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("vlm_carrier_copies_total{")]
    own = [line for line in lines if f'worker="carrier.{node}"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in own)


def kill(head: Server, node: Server, name: str, salt: str = "") -> list[str]:
    """Kills a worker, and waits for its successor. With `salt` it asks while there is none."""
    said = f"{name} serves again"
    before = sum(said in line for line in list(head.lines))
    os.kill(workers_of(node.process.pid)[name], signal.SIGKILL)
    answers = ask_many(head, salt) if salt else []
    head.wait_for(said, count=before + 1)
    node.children = workers_of(node.process.pid)
    return answers


def ask_while(head: Server, salt: str, kills: Sequence[tuple[Server, str]]) -> list[str]:
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(ask_many, head, salt)
        for node, name in kills:
            time.sleep(0.3)
            kill(head, node, name)
        return answers.result()


def test_pixels_go_to_another_node_and_no_death_on_their_way_loses_a_request(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, LOOPBACK, *QUICK)
    with cluster.head() as head, cluster.node(1) as node:
        whole = ask_many(head, "a")
        end = time.monotonic() + PATIENCE_S
        while not copies(head, 1):
            assert ask_many(head, str(time.monotonic())) == whole
            assert time.monotonic() < end, "the other node gets no pictures"
        assert len(set(whole)) > 1, "else equal answers would prove nothing"
        assert ask_while(head, "b", [(node, "carrier.1"), (head, "carrier.0")]) == whole


def test_embeddings_come_from_another_node_when_the_near_vit_is_away(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, LOOPBACK, *QUICK)
    with cluster.head() as head, cluster.node(1, "--vit-only"):
        whole = ask_many(head, "a")
        end = time.monotonic() + PATIENCE_S
        number = 0
        while not copies(head, 0):
            number += 1
            assert kill(head, head, "vit.0", salt=str(number)) == whole
            assert time.monotonic() < end, "the near ViT is never away"
