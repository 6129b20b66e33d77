"""Real client programs, unchanged, against a real server: each of their checks is a test here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import EMBEDDED
from tests.clients.conftest import Installed
from tests.servers import Server

HERE = Path(__file__).parent
PICTURE = EMBEDDED / "samples" / "red-star.png"
PROGRAM_TIMEOUT_S = 200
NUM_AT_ONCE = 4
NAMES = {".py": r"^(?:async )?def check_(\w+)", ".mjs": r'^await check\("(\w+)"'}
PROGRAMS = sorted([*HERE.glob("*_client.py"), *HERE.glob("*_node.mjs"), HERE / "ai_sdk.mjs"])
CHECKS = [
    (path.name, name) for path in PROGRAMS for name in re.findall(NAMES[path.suffix], path.read_text(), re.M)
]
# Nothing but the server is asked: no prices, no statistics. Programs share the bytecode of what they import.
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
}


class Programs:
    """Runs each program once, some at a time: most of their time is that of their imports."""

    def __init__(self, server: Server, installed: Installed, names: Iterable[str]) -> None:
        self._url, self._installed = server.url, installed
        self._threads = ThreadPoolExecutor(NUM_AT_ONCE)
        self._running = {name: self._threads.submit(self._run, name) for name in names}

    def error(self, program: str, name: str) -> str | None:
        found = self._running[program].result()
        return found[name] if name in found else f"the program ended before: {found['']}"

    def stop(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _run(self, program: str) -> dict[str, Any]:
        """The error of each check, and what the program wrote at its end under no name."""
        if program.endswith(".py"):
            command, folder = [str(self._installed.python), str(HERE / program), self._url], HERE
        else:
            command, folder = ["node", program, self._url, str(PICTURE)], self._installed.javascript
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT_S,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
        told = {"": f"exit status {done.returncode}, {done.stderr[-3000:]}"}
        return told | {line["check"]: line["error"] for line in lines}


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest, server: Server, installing: Future[Installed]
) -> Iterator[Programs]:
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    names = dict.fromkeys(spec.params["program"] for spec in asked if spec and "program" in spec.params)
    made = Programs(server, installing.result(), names)
    yield made
    made.stop()


@pytest.mark.timeout(300)  # the first waits for the packages
@pytest.mark.parametrize(("program", "name"), CHECKS)
def test_a_client_is_served(programs: Programs, program: str, name: str) -> None:
    error = programs.error(program, name)
    assert error is None, error
