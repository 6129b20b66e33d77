from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.announcement import shown_host
from launcher.checkpoints import EMBEDDED, find_model
from launcher.cli import build_parser, parse
from launcher.placement import place, workers
from launcher.run_dir import RunDir
from pipeline.config import Config, ModelConfig
from pipeline.wire.topology import Role, WorkerId

NODES = ("--nnodes", "2", "--master-addr", "h", "--node-token-file", "t")


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert parse([]) == Config()


def test_every_option_reaches_its_field() -> None:
    config = parse(
        [
            "--model",
            "m",
            "--tensor-parallel-size",
            "4",
            "--api-key",
            "a",
            "b",
            "--allow-private-media",
            "--kv-cache-gib",
            "0.5",
        ]
    )
    assert (config.model.model, config.llm.tp, config.num_vits) == ("m", 4, 4)
    assert (config.api.api_key, config.preprocess.allow_private_media, config.llm.kv_cache_gib) == (
        ("a", "b"),
        True,
        0.5,
    )
    assert parse(["--tp", "2", "--vit", "1"]).num_vits == 1


def test_every_field_has_an_option_with_help() -> None:
    text = build_parser().format_help()
    for section in dataclasses.fields(Config()):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            if not field.metadata:
                continue  # not given on the command line
            assert f"--{field.name.replace('_', '-')}" in text
            assert len(field.metadata["help"]) > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--mod", "x"], "--mod"),
        (["--tp", "0"], "tp must be at least 1 and finite, got 0"),
        (["--expert-parallel"], "expert_parallel needs several ranks, but tp is 1"),
        (["--port", "70000"], "port must be at most 65535, got 70000"),
        (["--dtype", "int3"], "int3"),
        (["--media-timeout-s", "nan"], "media_timeout_s must be at least 0.1 and finite"),
        (["--kv-cache-gib", "inf"], "kv_cache_gib must be above 0 and finite"),
        (
            ["--max-open-requests", "65537"],
            "max_open_requests must be at most 65536, got 65537",
        ),
        (
            ["--max-items-per-request", "2000", "--max-open-requests", "8"],
            "max_items_per_request must be at most 1024",
        ),
        (["--allowed-local-media-path", "/no/such"], "is no folder"),
        (["--min-pixels", "10", "--max-pixels", "5"], "min_pixels must be at most max_pixels"),
    ],
)
def test_bad_options_end_with_the_option_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_the_embedded_model_is_the_default_and_says_what_it_can() -> None:
    model = find_model(ModelConfig())
    assert model.folder == EMBEDDED / "model"
    assert "shapes" in model.notice
    assert model.sample is not None
    assert model.sample.is_file()


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        find_model(ModelConfig(model=name))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="no safetensors"):
        find_model(ModelConfig(model=str(tmp_path)))


def test_a_hub_name_that_cannot_be_had_is_an_error_with_its_name() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be downloaded"):
        find_model(ModelConfig(model="nobody/nothing"))


def test_modelscope_without_its_package_says_so() -> None:
    with pytest.raises(ValueError, match="pip install modelscope"):
        find_model(ModelConfig(model="nobody/nothing", download_from="modelscope"))


@pytest.mark.parametrize("num_cores", [1, 2, 4, 8, 13, 64])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_cores_are_divided_and_none_is_left_without(num_cores: int, size: int) -> None:
    cores = list(range(10, 10 + num_cores))
    placement = place(cores, size, size)
    assert set(placement) == set(workers(size, size, has_gateway=True, num_carriers=1))
    for share in placement.values():
        assert share.cores
        assert set(share.cores) <= set(cores)
        assert 1 <= share.num_threads <= len(share.cores)
    if num_cores > 1:
        vits = {core for index in range(size) for core in placement[WorkerId(Role.VIT, index)].cores}
        ranks = {core for rank in range(size) for core in placement[WorkerId(Role.LLM, rank)].cores}
        assert not vits & ranks
        assert vits | ranks == set(cores)
    assert [placement[WorkerId(Role.LLM, rank)].device for rank in range(size)] == list(range(size))


def test_a_run_directory_is_private_locked_and_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(str(path), tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(folder / "llm.1"))
        with pytest.raises(ValueError, match="in use by another launcher"), RunDir(str(path), tmp_path):
            pass
    assert [entry.name for entry in path.iterdir()] == ["lock"]
    path.chmod(0o755)
    with pytest.raises(ValueError, match="mode 0700"), RunDir(str(path), tmp_path):
        pass


def test_what_others_keep_in_a_given_folder_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "ranks.txt").write_text("mine")
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(str(tmp_path / "bus"))
        with RunDir(str(tmp_path), tmp_path):
            pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bus", "lock", "ranks.txt"]


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("fe80::1", "[fe80::1]"),
        ("host", "host"),
    ],
)
def test_hosts_as_urls_show_them(host: str, shown: str) -> None:
    assert shown_host(host) == shown


def test_a_run_directory_of_its_own_vanishes(short_path: Path) -> None:
    with RunDir("", short_path) as folder:
        assert folder.parent == short_path
    assert os.listdir(short_path) == []


def test_who_computes_alone_may_have_all_cores_unless_a_number_was_given() -> None:
    elastic = place(range(8), 2, 2, is_elastic=True)
    fixed = place(range(8), 2, 2)
    for worker, placement in elastic.items():
        assert (placement.cores, placement.num_threads) == (fixed[worker].cores, fixed[worker].num_threads)
        assert fixed[worker].wide_cores == ()
    assert [elastic[WorkerId(Role.LLM, rank)].wide_cores for rank in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [elastic[WorkerId(Role.VIT, rank)].wide_cores for rank in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    given = place(range(8), 1, 1, num_llm_cores=5, num_vit_cores=4, is_elastic=True)
    assert given[WorkerId(Role.LLM)].cores == (0, 1, 2, 3, 4)
    assert given[WorkerId(Role.VIT)].cores == (4, 5, 6, 7)
    assert {placement.wide_cores for placement in given.values()} == {()}
    assert place([3], 1, 1, is_elastic=True)[WorkerId(Role.LLM)].wide_cores == (), (
        "one core is everybody's anyway"
    )


@pytest.mark.parametrize("num_cores", [2, 3, 4])
def test_turns_are_taken_where_the_llm_s_own_cores_would_be_too_few(num_cores: int) -> None:
    placement = place(range(num_cores), 1, 1, is_elastic=True, can_take_turns=True)
    both = [placement[WorkerId(role)] for role in (Role.LLM, Role.VIT)]
    assert [one.takes_turns for one in both] == [num_cores < 4] * 2
    assert [one.wide_cores for one in both] == [tuple(range(num_cores))] * 2


def test_no_turns_are_taken_where_cores_were_given_or_one_side_cannot() -> None:
    cannot = place(range(2), 1, 1, is_elastic=True)
    given = place(range(2), 1, 1, num_vit_cores=1, is_elastic=True, can_take_turns=True)
    fixed = place(range(2), 1, 1, can_take_turns=True)
    for placement in (cannot, given, fixed):
        assert not any(one.takes_turns for one in placement.values())


def test_an_unknown_parser_is_named_before_anything_starts() -> None:
    command = [sys.executable, "-m", "launcher", "--tool-call-parser", "nobody"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "there is no tool call parser 'nobody'; known are auto, none, hermes" in ended.stderr


def test_without_its_packages_tracing_is_refused_before_anything_starts() -> None:
    hide = "import sys; sys.modules['opentelemetry'] = None; from launcher import cli"
    options = ["--otlp-traces-endpoint", "http://127.0.0.1:1/v1/traces"]
    out = subprocess.run(
        [sys.executable, "-c", f"{hide}; sys.exit(cli.main(sys.argv[1:]))", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert out.returncode == 1
    assert "pip install 'vlm-pipeline[otel]'" in out.stderr + out.stdout
    assert "Traceback" not in out.stderr


def test_the_environment_says_which_node_this_is_where_there_is_a_token() -> None:
    lws = {"LWS_GROUP_SIZE": "3", "LWS_WORKER_INDEX": "2", "LWS_LEADER_ADDRESS": "head.pods"}
    token = ("--node-token-file", "t")
    found = parse(token, lws).cluster
    assert (found.nnodes, found.node_rank, found.master_addr, found.master_port) == (3, 2, "head.pods", 29400)
    assert parse(token, {}).cluster.nnodes == 1
    assert parse((), lws).cluster.nnodes == 1, "it may be there for something else"
    assert parse((*token, "--nnodes", "1"), lws).cluster.nnodes == 1
    torchrun = {"MASTER_ADDR": "a", "MASTER_PORT": "1234", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
    found = parse((*token, "--master-addr", "10.0.0.1"), torchrun).cluster
    assert (found.node_rank, found.master_addr, found.master_port) == (1, "10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--nnodes", "2"), "nnodes 2 needs master_addr"),
        (("--nnodes", "2", "--master-addr", "h"), "needs node_token_file"),
        (("--head-only",), "head_only needs nnodes of 2 or more"),
        (("--nodes-per-group", "2"), "nodes_per_group needs nnodes"),
        (("--node-rank", "1"), "node_rank 1 must be less than nnodes, 1"),
        ((*NODES, "--vit-only"), "vit_only is an option of other nodes"),
        ((*NODES, "--node-ports", "9-8"), "must be FIRST-LAST"),
        ((*NODES, "--nodes-per-group", "2"), "needs trusted_network"),
        ((*NODES, "--nodes-per-group", "2", "--trusted-network"), "tp is 1, dp 1"),
    ],
)
def test_nodes_that_cannot_be(
    options: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(options)
    assert sentence in capsys.readouterr().err
