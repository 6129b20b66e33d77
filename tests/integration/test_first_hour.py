"""Every command of docs/first-hour.md is run, as it stands there; and the program of docs/direct.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-hour.md").read_text()
DIRECT = (ROOT / "docs" / "direct.md").read_text()
KILL = """/admin/kill -H 'Authorization: Bearer tour'"""
# What is not run: a server of the tour's own (its options are those of the fixture), Docker.
NOT_RUN = ("-m launcher", "docker compose")


def commands(step: str) -> list[str]:
    """The blocks of a step, by a word of its title."""
    (text,) = [part for part in PAGE.split("\n## ")[1:] if step in part.splitlines()[0]]
    return re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)


class _Tour:
    """A terminal in a folder that looks like the clone."""

    def __init__(self, folder: Path, server: Server | None = None) -> None:
        """`server`: takes the place of the page's."""
        (folder / "launcher").symlink_to(ROOT / "launcher")
        self.folder = folder
        self._meant = {".venv/bin/python": sys.executable}
        if server is not None:
            self._meant |= {
                "-m tools.chat": f"-m tools.chat --url {server.url}",
                "http://127.0.0.1:8000": server.url,
                "/tmp/vlm-tour": str(server.run_dir),
            }

    def run(self, command: str) -> str:
        """Its output."""
        for said, meant in self._meant.items():
            command = command.replace(said, meant)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Tour]:
    with Server("--admin-key", "tour") as server:
        yield _Tour(tmp_path_factory.mktemp("clone"), server)


def test_every_command_of_the_page_is_run_here() -> None:
    steps = [part.splitlines()[0] for part in PAGE.split("\n## ")[1:]]
    run = ("picture", "video", "JSON", "batch", "Without HTTP", "Another machine", "dashboard", "Kill")
    for step in steps:
        has_commands = [one for one in commands(step) if not any(word in one for word in NOT_RUN)]
        assert not has_commands or any(word in step for word in run), step


def test_a_picture(tour: _Tour) -> None:
    (command,) = commands("picture")
    shapes, number, chinese = tour.run(command).splitlines()
    assert all(shape in shapes for shape in ("cross", "ring", "heart"))
    assert "427" in number
    assert "星" in chinese


def test_a_video(tour: _Tour) -> None:
    (command,) = commands("video")
    assert "moves to the right" in tour.run(command)
    assert (tour.folder / "circle.mp4").stat().st_size > 0


def test_an_answer_as_json(tour: _Tour) -> None:
    (command,) = commands("JSON")
    answer = json.loads(tour.run(command))
    found = json.loads(answer["choices"][0]["message"]["content"])
    assert found == {"shape": "star", "color": "red"}
    assert json.dumps(found) in PAGE


def test_a_batch(tour: _Tour) -> None:
    (command,) = commands("batch")
    answers = dict(line.split(" - ", 1) for line in tour.run(command).splitlines())
    samples = {path.stem for path in (ROOT / "launcher" / "embedded" / "samples").glob("*.png")}
    assert set(answers) == samples
    assert "star" in answers["red-star"]


def test_without_http(tour: _Tour) -> None:
    (command,) = commands("Without HTTP")
    assert "stop" in tour.run(command)


def test_the_program_of_direct_zeromq(tour: _Tour) -> None:
    """Of docs/direct.md."""
    (program,) = re.findall(r"^```python\n(.*?)^```", DIRECT, re.S | re.M)
    assert "star" in tour.run(f".venv/bin/python - <<'END'\n{program.replace('RUN_DIR', '/tmp/vlm-tour')}END")


def test_another_machine(tmp_path: Path) -> None:
    serve, ask = commands("Another machine")
    *make_keys, launch = serve.splitlines()
    client = _Tour(tmp_path)
    for command in make_keys:
        client.run(command)
    options = dict(re.findall(r"--(\S+) (\S+)", launch.split("-m launcher ")[1]))
    assert options.pop("run-dir") == "/tmp/vlm-tour"
    options |= {"direct-host": "127.0.0.1", "direct-keys": str(tmp_path / options["direct-keys"])}
    with Server(*(f"--{name}={value}" for name, value in options.items())):
        assert "stop" in client.run(ask)


def test_a_dashboard(tour: _Tour) -> None:
    _, look = commands("dashboard")
    told = tour.run(look)
    for name in ("worker_ready", "generation_tokens", "prefix_cache"):
        assert f"vlm_{name}" in told


def test_a_worker_is_killed(tour: _Tour) -> None:
    kill, look = commands("Kill")
    assert KILL in kill
    assert '"completion_tokens":800' in tour.run(kill).replace(" ", "")
    restarts = dict(re.findall(r'worker="([\w.]+)"\} (\d+)', tour.run(look)))
    assert restarts["llm.0"] == "1"
