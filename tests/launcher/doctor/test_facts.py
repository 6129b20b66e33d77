"""The facts of this machine."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from launcher.doctor.facts import REQUIRED, gather
from launcher.doctor.findings import can_serve, findings

ROOT = Path(__file__).parents[3]
NAMES = {"pillow": "PIL", "pyzmq": "zmq"}  # of modules, where the package has another


def test_this_machine_can_serve_the_embedded_model() -> None:
    facts = gather(os.environ)
    assert can_serve(findings(facts)), findings(facts)
    assert facts.torch.startswith("2.")
    assert 0 < facts.available <= facts.memory
    assert facts.disk > 0
    assert facts.num_cores == len(os.sched_getaffinity(0))


def test_a_torch_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so is gone')")
    facts = gather({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert facts.torch_error == "OSError: libtorch.so is gone"
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    assert "its process ended with -6" in gather({**os.environ, "PYTHONPATH": str(tmp_path)}).torch_error


def test_the_required_packages_are_those_of_the_installation() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    names = {re.split("[<>=]", line)[0] for line in lines} - {"torch"}
    assert set(REQUIRED) == {NAMES.get(name, name) for name in names}


def test_the_command_has_two_names() -> None:
    """`tools.doctor` runs `launcher.doctor`."""
    command = [sys.executable, "-m", "tools.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["can_serve"]
