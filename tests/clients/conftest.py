"""The clients' packages, installed once for a session: none of them is one of the server's environment."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.conftest import LIMITS
from tests.servers import Server

HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 300
# What installers print if there is no package index; any other failure is one of the test.
UNREACHABLE = re.compile(
    r"dns error|tcp connect|error sending request|operation timed out|NewConnectionError|ENOTFOUND|EAI_AGAIN"
    r"|ECONNREFUSED|ETIMEDOUT|network is unreachable|name resolution",
    re.IGNORECASE,
)


class Installed(NamedTuple):
    python: Path  # the interpreter with the Python clients
    javascript: Path  # the folder with the programs in JavaScript and their packages


@pytest.fixture(scope="session")
def installing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Installed]]:
    """The server starts meanwhile."""
    python, javascript = tmp_path_factory.mktemp("clients"), tmp_path_factory.mktemp("clients-js")

    def install() -> Installed:
        other = threads.submit(_install_javascript, javascript)
        _install_python(python)
        other.result()
        return Installed(python / "bin" / "python", javascript)

    with ThreadPoolExecutor() as threads:
        yield threads.submit(install)


def _install_python(folder: Path) -> None:
    """With uv, which takes 15 s where pip takes a minute."""
    packages = ("--no-deps", "-r", str(HERE / "requirements.txt"))
    if importlib.util.find_spec("uv"):
        uv = (sys.executable, "-m", "uv", "--no-progress")
        _run(folder, *uv, "venv", "--python", sys.executable, str(folder), "--allow-existing")
        _run(folder, *uv, "pip", "install", "--python", str(folder / "bin" / "python"), *packages)
    else:
        _run(folder, sys.executable, "-m", "venv", str(folder))
        _run(folder, str(folder / "bin" / "pip"), "install", *packages)


def _install_javascript(folder: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    for path in (*HERE.glob("*.mjs"), *HERE.glob("package*.json")):
        shutil.copy(path, folder)
    _run(folder, "npm", "ci", "--no-audit", "--no-fund", "--loglevel", "error")


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode:
        told = done.stdout + done.stderr
        if UNREACHABLE.search(told):
            pytest.skip(f"no package index can be reached: {told[-300:]}")
        raise AssertionError(f"{' '.join(command)} failed:\n{told[-3000:]}")


@pytest.fixture(scope="module")
def server(installing: Future[Installed]) -> Iterator[Server]:
    """The embedded model in float32, with room for what clients write around a question."""
    limits = [*LIMITS, "--max-model-len", "2048"]
    with Server("--dtype", "float32", *limits) as running:
        yield running
