"""tools/deploy/kubernetes/cluster/: validated by published schemas, and of one mind with the launcher."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.cli import build_parser, parse
from launcher.node_environment import Node, read_node

FOLDER = Path(__file__).parents[2] / "tools" / "deploy" / "kubernetes" / "cluster"
LWS, DEPLOYMENTS = FOLDER / "lws.yml", FOLDER / "deployments.yml"
SCHEMA = json.loads((Path(__file__).parent / "leader_worker_set.schema.json").read_text())
VALIDATE = Path(sys.executable).parent / "kubernetes-validate"
NODE_OPTIONS = (
    "--nnodes", "--node-rank", "--master-addr", "--master-port", "--node-token-file", "--node-address",
    "--node-ports",
)  # fmt: skip
TOKEN = "/token/token"

Manifest = dict[str, Any]


def manifests(path: Path) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def named(path: Path, kind: str) -> list[Manifest]:
    return [one for one in manifests(path) if one["kind"] == kind]


def validate(folder: Path, found: list[Manifest]) -> subprocess.CompletedProcess[str]:
    """By Kubernetes' own schemas: nothing that they do not know passes."""
    file = folder / "manifests.yml"
    file.write_text(yaml.safe_dump_all(found))
    return subprocess.run([VALIDATE, "--strict", file], capture_output=True, text=True, check=False)


def lws() -> Manifest:
    (found,) = named(LWS, "LeaderWorkerSet")
    return found


def templates() -> dict[str, Manifest]:
    """Of pods, by what they are to the nodes."""
    of_lws = lws()["spec"]["leaderWorkerTemplate"]
    first, second = (one["spec"]["template"] for one in named(DEPLOYMENTS, "Deployment"))
    return {
        "lws head": of_lws["leaderTemplate"],
        "lws node": of_lws["workerTemplate"],
        "head": first,
        "node": second,
    }


def container(template: Manifest) -> Manifest:
    (found,) = template["spec"]["containers"]
    return found


def options(template: Manifest) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in container(template)["args"])


def test_what_kubernetes_knows_is_valid(tmp_path: Path) -> None:
    pods = [
        {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": name.replace(" ", "-")},
            "template": one,
        }
        for name, one in templates().items()
    ]
    known = [
        one for path in (LWS, DEPLOYMENTS) for one in manifests(path) if one["kind"] != "LeaderWorkerSet"
    ]
    assert {one["kind"] for one in known} == {"ServiceAccount", "Service", "NetworkPolicy", "Deployment"}
    ended = validate(tmp_path, [*known, *pods])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    pods[1]["template"]["spec"]["containers"][0]["resource"] = {}
    assert validate(tmp_path, pods).returncode != 0, "nothing is found in a template"


def test_the_leader_worker_set_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    check = jsonschema.Draft202012Validator(SCHEMA)
    assert [error.message for error in check.iter_errors(lws())] == []
    for place, value in (("restartPolicy", "Never"), ("size", 0), ("leaderTemplates", {})):
        wrong = copy.deepcopy(lws())
        wrong["spec"]["leaderWorkerTemplate"][place] = value
        assert [*check.iter_errors(wrong)], place


@pytest.mark.parametrize("name", templates())
def test_the_launcher_takes_the_arguments(name: str) -> None:
    template = templates()[name]
    others = [one for one in container(template)["args"] if not one.startswith(NODE_OPTIONS)]
    are_offered = "--nnodes" in build_parser().format_help()
    config = parse(container(template)["args"] if are_offered else others)
    assert config.api.access_log == "json"
    given = options(template)
    assert given["--node-token-file"] == TOKEN
    assert given["--node-address"] == "$(POD_IP)"
    (address,) = (one for one in container(template)["env"] if one["name"] == "POD_IP")
    assert address["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


def test_pods_of_a_set_learn_their_place_from_it() -> None:
    """The arguments are the same in all pods, and say nothing of nodes."""
    head, node = (templates()[name] for name in ("lws head", "lws node"))
    assert container(head)["args"] == container(node)["args"]
    assert not set(options(head)) & {"--nnodes", "--node-rank", "--master-addr"}
    size = lws()["spec"]["leaderWorkerTemplate"]["size"]
    environment = {
        "LWS_GROUP_SIZE": str(size),
        "LWS_WORKER_INDEX": "1",
        "LWS_LEADER_ADDRESS": "vlm-pipeline-0.x",
    }
    assert read_node(environment) == Node(size, 1, "vlm-pipeline-0.x", None, "LeaderWorkerSet")


def test_deployments_say_their_place() -> None:
    found = [options(templates()[name]) for name in ("head", "node")]
    assert [one["--node-rank"] for one in found] == ["0", "1"]
    assert {one["--nnodes"] for one in found} == {str(len(named(DEPLOYMENTS, "Deployment")))}
    (head,) = (one for one in named(DEPLOYMENTS, "Service") if one["spec"].get("clusterIP") == "None")
    assert {one["--master-addr"] for one in found} == {head["metadata"]["name"]}
    labels = templates()["head"]["metadata"]["labels"]
    assert head["spec"]["selector"].items() <= labels.items()
    assert not head["spec"]["selector"].items() <= templates()["node"]["metadata"]["labels"].items()
    assert head["spec"]["publishNotReadyAddresses"], "else nodes find the head only when all of it is ready"


def ports_of(template: Manifest) -> set[int]:
    """On which the launcher and its workers listen for other nodes."""
    given = options(template)
    first, last = map(int, given["--node-ports"].split("-"))
    reports = int(given["--master-port"])
    return {reports, reports + 1, *range(first, last + 1)}


@pytest.mark.parametrize("path", [LWS, DEPLOYMENTS], ids=lambda path: path.stem)
def test_the_network_policy_lets_nodes_through_and_nobody_else(path: Path) -> None:
    (policy,) = named(path, "NetworkPolicy")
    open_to_all: set[int] = set()
    open_to_nodes: set[int] = set()
    for rule in policy["spec"]["ingress"]:
        ports = {
            port for one in rule["ports"] for port in range(one["port"], one.get("endPort", one["port"]) + 1)
        }
        if "from" in rule:
            assert rule["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
            open_to_nodes |= ports
        else:
            open_to_all |= ports
    names = ("lws head", "lws node") if path == LWS else ("head", "node")
    assert open_to_all == {8000}
    assert all(open_to_nodes == ports_of(templates()[name]) for name in names)


@pytest.mark.parametrize("name", templates())
def test_the_token_is_the_launchers_own_file(name: str) -> None:
    """Kubernetes gives a Secret's files to root, for a group to read."""
    spec = templates()[name]["spec"]
    (copier,) = spec["initContainers"]
    assert copier["command"] == ["install", "-m", "400", "/secret/token", TOKEN]
    assert copier["image"] == spec["containers"][0]["image"]
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert volumes["secret"]["secret"] == {"secretName": "vlm-pipeline-nodes"}
    assert volumes["token"]["emptyDir"]["medium"] == "Memory", "it is on no disk"
    mounts = {one["name"]: one for one in spec["containers"][0]["volumeMounts"]}
    assert "secret" not in mounts
    assert mounts["token"]["mountPath"] == str(Path(TOKEN).parent)


@pytest.mark.parametrize("name", templates())
def test_only_the_head_is_probed(name: str) -> None:
    found = container(templates()[name])
    probes = {probe: found[probe]["httpGet"]["path"] for probe in found if probe.endswith("Probe")}
    is_head = name.endswith("head")
    expected = {"startupProbe": "/ready", "readinessProbe": "/health", "livenessProbe": "/health"}
    assert probes == (expected if is_head else {})
    assert found["securityContext"]["readOnlyRootFilesystem"]
    assert "memory" in found["resources"]["limits"]


def test_nccl_has_shared_memory_where_there_are_gpus() -> None:
    for name, template in templates().items():
        has_gpu = "nvidia.com/gpu" in container(template)["resources"]["limits"]
        shared = [one for one in template["spec"]["volumes"] if one["name"] == "shm"]
        assert has_gpu == name.startswith("lws")
        assert [one["emptyDir"]["medium"] for one in shared] == (["Memory"] if has_gpu else [])
