"""The actor without Ray: a child that stands for the launcher."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from launcher import ray_node
from launcher.ray_node import Launch, NodeNews, RayNode
from tests.servers import is_alive

# Takes the place of `launcher.ray_child`: announces itself, keeps the secret that it was given, and lives.
CHILD = """
import signal, sys, time
folder, token = sys.argv[2], sys.stdin.read()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(folder + "/token", "w").write(token)
print(f"Serving at http://{sys.argv[3]}/v1 — try", flush=True)
time.sleep(600)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    package = tmp_path / "launcher"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "ray_child.py").write_text(CHILD)
    monkeypatch.setattr(ray_node, "PROJECT", tmp_path)
    ray = ModuleType("ray")
    ray.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "id")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    return Launch((str(tmp_path), "one"), "a secret", {}, str(tmp_path))


def until(node: RayNode, launch: Launch, is_reached: Callable[[NodeNews], bool]) -> NodeNews:
    for _ in range(300):
        if is_reached(news := node.keep(launch, 0.1)):
            return news
    raise AssertionError(news)


def test_the_child_is_started_again_replaced_and_stopped(launch: Launch, tmp_path: Path) -> None:
    node = RayNode()
    assert node.keep(None, 0) == NodeNews("id", os.getpid(), 0, "", 0)
    first = until(node, launch, lambda news: news.url == "http://one")
    assert (tmp_path / "token").read_text() == "a secret"
    arguments = Path(f"/proc/{first.launcher_pid}/cmdline").read_bytes()
    assert b"one" in arguments
    assert b"a secret" not in arguments

    os.kill(first.launcher_pid, signal.SIGKILL)
    second = until(node, launch, lambda news: bool(news.url) and news.launcher_pid != first.launcher_pid)
    assert second.num_failures == 0, "it had served"

    other = launch._replace(arguments=(str(tmp_path), "two"))
    third = until(node, other, lambda news: news.url == "http://two")
    assert not is_alive(second.launcher_pid)

    assert node.stop(20)
    assert not is_alive(third.launcher_pid)
    assert node.keep(launch, 0.2).launcher_pid == 0, "it ends, whoever calls late"


def test_failed_starts_are_counted(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "launcher" / "ray_child.py").write_text("raise SystemExit(1)")
    node = RayNode()
    until(node, launch, lambda news: news.num_failures == 1)
    node.release()
