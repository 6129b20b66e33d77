from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.cli import parse
from launcher.node_command import arguments_of, bundle, node_config
from launcher.ray_node import LONGEST_PAUSE_S, pause_s
from launcher.ray_placement import PlacementFailed, RayPlacement, url_at
from pipeline.config.cluster import ClusterConfig

RAY = ("--placement", "ray", "--nnodes", "2")


@pytest.mark.parametrize(
    ("options", "head", "other"),
    [
        # each node has a carrier beside its ranks and ViTs, the head preprocess and api, too
        (("--tp", "2", "--dp", "2"), {"CPU": 11, "GPU": 4}, {"CPU": 9, "GPU": 4}),
        (("--device", "cpu"), {"CPU": 5}, {"CPU": 3}),
        (("--device", "cpu", "--ray-gpus", "1"), {"CPU": 5, "GPU": 1}, {"CPU": 3, "GPU": 1}),
        (("--ray-cpus", "7", "--ray-gpus", "0"), {"CPU": 7}, {"CPU": 7}),
        (("--head-only",), {"CPU": 3}, {"CPU": 3, "GPU": 1}),
        (("--vit-only", "--vit", "3"), {"CPU": 7, "GPU": 1}, {"CPU": 4, "GPU": 3}),
    ],
)
def test_a_node_gets_what_its_workers_need(
    options: tuple[str, ...], head: dict[str, float], other: dict[str, float]
) -> None:
    config = parse([*RAY, *options])
    assert [bundle(config, rank) for rank in range(2)] == [head, other]


EVERYTHING = (
    *RAY, "--model", "m", "--lora", "a=/a", "b=/b", "--no-prefix-caching", "--allow-private-media",
    "--port", "9", "--kv-cache-gib", "0.5", "--node-ports", "30000-30009", "--api-key", "secret",
    "--admin-key", "secret2", "--media-proxy", "http://user:secret@proxy:1", "--run-dir", "/run/vlm",
    "--head-only",
)  # fmt: skip


def test_a_nodes_command_line_says_what_the_drivers_said() -> None:
    config = parse(EVERYTHING)
    for rank in range(2):
        node = node_config(config, rank, "10.0.0.1")
        assert parse(arguments_of(node)) == node
        assert (node.cluster.node_rank, node.cluster.master_addr) == (rank, "10.0.0.1")
        assert (node.model, node.llm, node.vit) == (config.model, config.llm, config.vit)
        assert node.launcher.run_dir == f"/run/vlm/{rank}"
        assert node.cluster.node_ports == "30000-30009"
        assert node.cluster.head_only is (rank == 0)


def test_secrets_go_to_the_head_only_and_the_token_to_no_command_line() -> None:
    config = parse(EVERYTHING)
    head, other = (" ".join(arguments_of(node_config(config, rank, "10.0.0.1"))) for rank in range(2))
    assert "--port=9" in head
    assert "secret" not in other
    for line in (head, other):
        assert "--node-token-file=/dev/stdin" in line
        assert "placement" not in line


def test_a_pipeline_of_one_node_is_placed_without_options_of_nodes() -> None:
    assert arguments_of(node_config(parse(["--placement", "ray", "--tp", "2"]), 0, "10.0.0.1")) == ("--tp=2",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"placement": "ray", "nnodes": 2, "master_addr": "h"}, "master_addr is not to be given"),
        ({"placement": "ray", "nnodes": 2, "node_rank": 1}, "node_rank is not to be given"),
        ({"placement": "ray", "ray_cpus": 0}, "ray_cpus must be at least 1"),
        ({"ray_gpus": 0}, "ray_gpus needs placement 'ray'"),
    ],
)
def test_options_that_do_not_fit_are_errors(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ClusterConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "host", "shown"),
    [
        ("http://127.0.0.1:80", "127.0.0.1", "http://127.0.0.1:80"),
        ("http://127.0.0.1:80", "0.0.0.0", "http://10.0.0.1:80"),
        ("https://[::1]:80", "::", "https://10.0.0.1:80"),
        ("http://vlm:80", "vlm", "http://vlm:80"),
    ],
)
def test_a_wildcard_is_shown_as_the_heads_address(url: str, host: str, shown: str) -> None:
    assert url_at(url, host, "10.0.0.1") == shown


def test_pauses_between_starts_grow_and_are_bounded() -> None:
    assert [pause_s(number) for number in range(4)] == [1, 2, 4, 8]
    assert pause_s(1000) == LONGEST_PAUSE_S


def test_without_ray_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlacementFailed, match=r"pip install 'vlm-pipeline\[ray\]'"):
        RayPlacement(parse(RAY), {}, Path()).run()
