"""What starters of nodes say in the environment, whole, in parts, and against each other."""

from __future__ import annotations

import re

import pytest

from launcher.node_environment import Node, first_host, read_node

TORCHRUN = {  # as torchrun 2.13 sets it, with --nnodes 2 --nproc-per-node 1
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "ROLE_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False",
}  # fmt: skip
PROCESSES = {"MASTER_ADDR": "head", "MASTER_PORT": "6000", "RANK": "2", "WORLD_SIZE": "3"}
LWS = {"LWS_LEADER_ADDRESS": "vlm-0.vlm.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
STEP = {  # as srun sets it, in a job of three nodes of which the step has two
    "SLURM_JOB_NUM_NODES": "3", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "192.168.0.1",
}  # fmt: skip
JOB = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_JOB_NODELIST": "rack[1-2]node[01-02]"}


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        (TORCHRUN, Node(2, 1, "10.0.0.1", 29500, "torchrun")),
        ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Node(2, 1, "10.0.0.1", None, "torchrun")),
        (PROCESSES, Node(3, 2, "head", 6000, "torchrun")),
        (LWS, Node(2, 1, "vlm-0.vlm.default", None, "LeaderWorkerSet")),
        ({**LWS, "MASTER_PORT": "7000"}, Node(2, 1, "vlm-0.vlm.default", 7000, "LeaderWorkerSet")),
        (STEP, Node(2, 0, "gpu08", None, "Slurm")),
        (JOB, Node(4, 3, "rack1node01", None, "Slurm")),
        # A batch script's own variables beside Slurm's.
        (
            {**STEP, "MASTER_ADDR": "gpu08.example.org", "MASTER_PORT": "6000", "WORLD_SIZE": "2"},
            Node(2, 0, "gpu08.example.org", 6000, "Slurm"),
        ),
        ({**STEP, "MASTER_ADDR": "10.1.0.8"}, Node(2, 0, "10.1.0.8", None, "Slurm")),
        # torchrun started by srun.
        ({**STEP, **TORCHRUN, "GROUP_RANK": "0"}, Node(2, 0, "10.0.0.1", 29500, "Slurm")),
    ],
)
def test_a_node_is_found(environment: dict[str, str], node: Node) -> None:
    assert read_node(environment) == node


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"MASTER_ADDR": "localhost"},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"MASTER_ADDR": "", "WORLD_SIZE": "2"},
        {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"},
        {**TORCHRUN, "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"},
        {**LWS, "LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"},
        {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_ID": "7"},
        {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "gpu7"},
        {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu08"},
    ],
)
def test_a_plain_shell_is_one_node(environment: dict[str, str]) -> None:
    assert read_node(environment) is None


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (without(PROCESSES, "RANK"), ("not RANK",)),
        (without(PROCESSES, "MASTER_ADDR"), ("not MASTER_ADDR",)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("not MASTER_ADDR, MASTER_PORT",)),
        (without(TORCHRUN, "MASTER_PORT"), ("not MASTER_PORT",)),
        (without(TORCHRUN, "GROUP_RANK"), ("not GROUP_RANK",)),
        (without(LWS, "LWS_WORKER_INDEX"), ("LWS_LEADER_ADDRESS", "not LWS_WORKER_INDEX")),
        (without(STEP, "SLURM_NODEID"), ("not SLURM_NODEID", "srun")),
        (without(JOB, "SLURM_JOB_NODELIST"), ("not SLURM_JOB_NODELIST",)),
        ({**STEP, "SLURM_STEP_NODELIST": "gpu[08-09"}, ("SLURM_STEP_NODELIST", "gpu[08-09")),
        ({**PROCESSES, "RANK": "3"}, ("RANK is 3", "WORLD_SIZE is 3")),
        ({**PROCESSES, "RANK": "one"}, ("RANK", "'one'")),
        ({**PROCESSES, "RANK": "-1"}, ("RANK", "'-1'")),
        ({**PROCESSES, "WORLD_SIZE": "0"}, ("WORLD_SIZE", "'0'")),
        ({**PROCESSES, "MASTER_PORT": "65535"}, ("MASTER_PORT", "65534")),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, ("LOCAL_WORLD_SIZE", "--nproc-per-node 1")),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS", "--ntasks-per-node=1")),
        # Two sources, or a source and a script's variables, that say different things.
        ({**STEP, **TORCHRUN}, ("rank of this node", "SLURM_NODEID", "GROUP_RANK")),
        ({**STEP, **LWS}, ("rank of this node", "LWS_WORKER_INDEX", "SLURM_NODEID")),
        (
            {**LWS, "LWS_GROUP_SIZE": "3", **TORCHRUN},
            ("number of nodes", "LWS_GROUP_SIZE", "GROUP_WORLD_SIZE"),
        ),
        ({**LWS, "WORLD_SIZE": "1"}, ("number of nodes", "LWS_GROUP_SIZE", "WORLD_SIZE")),
        ({**LWS, "RANK": "0"}, ("rank of this node", "LWS_WORKER_INDEX", "RANK")),
        ({**LWS, "MASTER_ADDR": "localhost"}, ("vlm-0.vlm.default", "LWS_LEADER_ADDRESS", "MASTER_ADDR")),
        ({**LWS, "MASTER_ADDR": "127.0.0.1"}, ("LWS_LEADER_ADDRESS", "MASTER_ADDR")),
        ({**STEP, "MASTER_ADDR": "gpu07"}, ("gpu08", "gpu07")),
        ({**STEP, "MASTER_ADDR": "gpu08x"}, ("gpu08", "gpu08x")),
        ({"SLURM_NNODES": "1", **TORCHRUN}, ("number of nodes", "SLURM_NNODES", "GROUP_WORLD_SIZE")),
    ],
)
def test_what_is_incomplete_or_contradictory_is_refused(
    environment: dict[str, str], named: tuple[str, ...]
) -> None:
    pattern = "".join(f"(?=.*{re.escape(words)})" for words in named)  # all of them, in any order
    with pytest.raises(ValueError, match=f"^{pattern}"):
        read_node(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-012,3],login", "gpu007"),
        ("gpu[3,7-9]-ib.example.org", "gpu3-ib.example.org"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("10.0.0.[4-7]", "10.0.0.4"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    "hosts", ["", ",gpu1", "gpu[1-2", "gpu1-2]", "gpu[[1]]", "gpu[]", "gpu[a-b]", "gpu[1-]", "a b"]
)
def test_what_is_no_list_of_hosts_is_refused(hosts: str) -> None:
    with pytest.raises(ValueError, match="is no list of hosts"):
        first_host(hosts)
