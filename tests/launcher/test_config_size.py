"""A configuration that is too large for the message to a worker is told so before anything starts."""

from __future__ import annotations

import re
import subprocess
import sys

import msgspec
import pytest

from launcher.config_size import check_size
from pipeline.config import ApiConfig, ApiKey, Config, PreprocessConfig
from pipeline.config.api import MAX_KEY_BYTES
from pipeline.process.fork_server import MAX_REQUEST, Start
from pipeline.process.process import Placement, WorkerSpec
from pipeline.wire.topology import Role, WorkerId

HOSTS = tuple(f"media-{number}.example.com" for number in range(3500))


def test_long_options_are_an_error_that_names_them() -> None:
    """Before, the launcher ended by an assertion when it started the first worker."""
    command = [sys.executable, "-m", "launcher", "--port", "0", "--allowed-media-domains", *HOSTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "all options together may have 51200 bytes" in ended.stderr
    assert f"--allowed-media-domains has {len(msgspec.msgpack.encode(HOSTS))}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_each_long_option_is_named() -> None:
    preprocess = PreprocessConfig(allow_priority=("n" * 500,) * 80, allowed_media_domains=("h" * 250,) * 50)
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
