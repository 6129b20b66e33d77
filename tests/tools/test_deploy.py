"""tools/deploy/: linted, and of one mind with the server's options."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import parse
from pipeline.config import Config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools" / "deploy"
SERVICE = FOLDER / "vlm-pipeline.service"
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yml"))
COMPOSE = sorted(FOLDER.glob("compose*.yml"))
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def passed(*command: str | Path) -> str:
    ended = run(*command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_dockerfile() -> None:
    passed(BIN / "hadolint", FOLDER / "Dockerfile")


def test_hadolint_finds_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd / && apt-get install gcc\n")
    assert run(BIN / "hadolint", tmp_path / "Dockerfile").returncode == 1


def entry_points() -> list[list[str]]:
    text = (FOLDER / "Dockerfile").read_text()
    return [re.findall(r'"([^"]*)"', line) for line in re.findall(r"^ENTRYPOINT .*$", text, re.M)]


def test_the_image_starts_the_launcher() -> None:
    for command in entry_points():
        assert command[:5] == ["tini", "--", "python3", "-m", "launcher"]
        config = parse(command[5:])
        assert (config.api.host, config.api.port) == ("0.0.0.0", 8000)
    assert len(entry_points()) == 2


def test_the_context_has_what_is_built() -> None:
    """Each path that setup.cfg and the Dockerfile name is let in, and the rest is not."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert let_in == {
        "LICENSE",
        "README.md",
        "setup.cfg",
        "setup.py",
        "launcher",
        "pipeline",
        "tools",
        "workers",
    }
    assert all((ROOT / name).exists() for name in let_in)


def test_compose_files() -> None:
    passed(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *COMPOSE)
    services = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]
    assert parse(services["vlm"]["command"]) != Config()
    mounted = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    files = [place for place in mounted if place.startswith("./")]
    assert [place for place in files if not (FOLDER / place).exists()] == []


def test_prometheus_looks_at_the_server_in_both_places() -> None:
    alone, beside = (
        yaml.safe_load((FOLDER / name).read_text()) for name in ("prometheus.yml", "prometheus-compose.yml")
    )
    assert beside["scrape_configs"][0].pop("static_configs") == [{"targets": ["vlm:8000"]}]
    assert alone["scrape_configs"][0].pop("static_configs") == [{"targets": ["127.0.0.1:8000"]}]
    assert alone == beside


def test_check_jsonschema_finds_something(tmp_path: Path) -> None:
    (tmp_path / "compose.yml").write_text("services:\n  vlm:\n    imagine: vlm\n")
    found = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yml")
    assert found.returncode == 1


def test_grafana_finds_what_compose_mounts() -> None:
    services = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]
    places = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    provider = yaml.safe_load((FOLDER / "grafana" / "dashboards.yml").read_text())["providers"][0]
    assert f"{provider['options']['path']}/grafana.json" in places
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in places
    source = yaml.safe_load((FOLDER / "grafana" / "datasource.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def containers(path: Path) -> list[dict[str, Any]]:
    found = [one for one in yaml.safe_load_all(path.read_text()) if one and one["kind"] == "Deployment"]
    return [container for one in found for container in one["spec"]["template"]["spec"]["containers"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests(path: Path) -> None:
    passed(BIN / "kubernetes-validate", "--strict", path)
    (container,) = containers(path)
    parse(container["args"])
    for name, route in (
        ("startupProbe", "/ready"),
        ("readinessProbe", "/health"),
        ("livenessProbe", "/health"),
    ):
        assert container[name]["httpGet"] == {"path": route, "port": "http"}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert "memory" in container["resources"]["limits"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/cache"}


def test_one_manifest_asks_for_a_gpu() -> None:
    limits = [container["resources"]["limits"] for path in MANIFESTS for container in containers(path)]
    assert ["nvidia.com/gpu" in limit for limit in limits] == [True, False]


def test_kubernetes_validate_finds_something(tmp_path: Path) -> None:
    wrong = (
        (FOLDER / "kubernetes" / "vlm-pipeline.yml").read_text().replace("readinessProbe", "readynessProbe")
    )
    (tmp_path / "wrong.yml").write_text(wrong)
    assert run(BIN / "kubernetes-validate", "--strict", tmp_path / "wrong.yml").returncode != 0


def test_the_service_starts_the_launcher() -> None:
    line = re.search(r"^ExecStart=(.*)$", SERVICE.read_text(), re.M)
    assert line is not None
    program, *command = shlex.split(line.group(1))
    assert (Path(program).name, command[:2], command[-1]) == ("python", ["-m", "launcher"], "$VLM_OPTIONS")
    assert parse(command[2:-1]).launcher.cache_dir == "${CACHE_DIRECTORY}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_service(tmp_path: Path) -> None:
    program = tmp_path / "python"  # systemd looks whether the program is there
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = SERVICE.read_text()
    (tmp_path / SERVICE.name).write_text(text.replace("/opt/vlm-pipeline/.venv/bin/python", str(program)))
    ended = run("systemd-analyze", "verify", "--man=no", tmp_path / SERVICE.name)
    assert (ended.returncode, SERVICE.name in ended.stderr) == (0, False), ended.stderr
    (tmp_path / SERVICE.name).write_text(text.replace("Type=notify", "Type=notify\nTippfehler=yes"))
    assert "Tippfehler" in run("systemd-analyze", "verify", "--man=no", tmp_path / SERVICE.name).stderr
