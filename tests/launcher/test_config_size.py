"""A configuration that is too large for the message to a worker is told so before anything starts."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import msgspec
import pytest

from launcher.config_size import check_size
from launcher.members import all_workers, doors_of, node_spec
from pipeline.config import (
    ApiConfig,
    ApiKey,
    ClusterConfig,
    Config,
    LlmConfig,
    PreprocessConfig,
    VitConfig,
)
from pipeline.config.api import MAX_KEY_BYTES
from pipeline.process.fork_server import MAX_FDS, MAX_REQUEST, Start
from pipeline.process.process import Placement, WorkerSpec
from pipeline.transport.keys import KeyPair
from pipeline.wire.topology import Role, WorkerId

HOSTS = tuple(f"media-{number}.example.com" for number in range(7000))


def test_long_options_are_an_error_that_names_them() -> None:
    """Before, the launcher ended by an assertion when it started the first worker."""
    command = [sys.executable, "-m", "launcher", "--port", "0", "--allowed-media-domains", *HOSTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "all options together may have 116736 bytes" in ended.stderr
    assert f"--allowed-media-domains has {len(msgspec.msgpack.encode(HOSTS))}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_each_long_option_is_named() -> None:
    preprocess = PreprocessConfig(allow_priority=("n" * 500,) * 180, allowed_media_domains=("h" * 250,) * 110)
    keys = (ApiKey("alice", "k" * 5000),)
    with pytest.raises(ValueError, match="they have") as caught:
        check_size(Config(preprocess=preprocess, api=ApiConfig(named_keys=keys)))
    named = re.findall(r"(--\S+) has", str(caught.value))
    assert named == ["--allow-priority", "--allowed-media-domains", "--api-key-file"]
    assert "kkk" not in str(caught.value)


def test_what_passes_fits_the_message_with_all_else_that_is_in_it() -> None:
    name, key = "n" * 48, "k" * 48
    num_keys = MAX_KEY_BYTES // (len(name) + len(key) + 16)
    keys = tuple(ApiKey(f"{name[:-4]}{number:04}", f"{key[:-4]}{number:04}") for number in range(num_keys))
    config = Config(api=ApiConfig(named_keys=keys))
    check_size(config)
    placement = Placement(cores=tuple(range(512)), num_threads=512, wide_cores=tuple(range(512)))
    spec = WorkerSpec(
        worker=WorkerId(Role.LLM),
        epochs={f"vit.{number}": 1000 for number in range(20)},
        run_dir="/" + "r" * 100,
        model_folder="/" + "m" * 200,
        placement=placement,
        config=config,
        quarantined={Role.LLM: (b"12345678",) * 1024},
    )
    assert len(msgspec.msgpack.encode(Start(1, spec))) <= MAX_REQUEST
    assert len(msgspec.msgpack.encode(spec)) - len(msgspec.msgpack.encode(config)) < 14 << 10


def test_the_addresses_of_eight_nodes_with_eight_groups_each_fit_too() -> None:
    cluster = ClusterConfig(nnodes=8, master_addr="::1", node_token_file="x")
    config = Config(cluster=cluster, llm=LlmConfig(dp=8), vit=VitConfig(vit=8))
    workers = all_workers(config)
    assert max(len(doors_of(worker, config)) for worker in workers) <= MAX_FDS
    url = "tcp://[2001:0db8:1111:2222:3333:4444:5555:6666]:65535"
    node = dataclasses.replace(
        node_spec(config, KeyPair(b"p" * 40, b"s" * 40)),
        keys=dict.fromkeys(range(8), b"p" * 40),
        urls={str(worker): dict.fromkeys(doors_of(worker, config), url) for worker in workers},
    )
    spec = WorkerSpec(
        worker=WorkerId(Role.CARRIER, 7), epochs={str(worker): 1000 for worker in workers}, run_dir="/r",
        model_folder="/m", placement=Placement(cores=(0,), num_threads=1), config=config, node=node,
    )  # fmt: skip
    check_size(config)
    of_nodes = len(msgspec.msgpack.encode(spec)) - len(msgspec.msgpack.encode(config))
    assert of_nodes < MAX_REQUEST - (14 << 10)
    with pytest.raises(ValueError, match="with the addresses of 64 nodes"):
        check_size(dataclasses.replace(config, cluster=dataclasses.replace(cluster, nnodes=64)))
