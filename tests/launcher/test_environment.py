"""Environments of containers: no home, no name, a long folder for temporary files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.checkpoints import find_model
from launcher.environment import (
    BRIEF_CACHE,
    MAX_BASE,
    MAX_SOCKET_NAME,
    cache_folder,
    home_folder,
    run_dir_base,
    workers_environment,
)
from launcher.run_dir import RunDir
from pipeline.config import ModelConfig
from pipeline.wire.topology import EDGES, MAX_IPC_PATH, socket_name


def nobody() -> str:
    raise KeyError("getpwuid(): uid not found: 54321")


def test_a_home_is_what_can_be_written(tmp_path: Path) -> None:
    assert home_folder({"HOME": str(tmp_path)}, nobody) == tmp_path
    assert home_folder({}, lambda: str(tmp_path)) == tmp_path
    assert home_folder({}, nobody) is None
    for unusable in ("", ".", "/no/such/home", __file__):
        assert home_folder({"HOME": unusable}, nobody) is None, unusable


def test_the_cache_lies_where_it_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, home, named = tmp_path / "run", tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    assert cache_folder(str(named), {}, None, run_dir) == named
    assert cache_folder("", {"XDG_CACHE_HOME": str(named)}, home, run_dir) == named / "vlm-pipeline"
    assert cache_folder("", {"XDG_CACHE_HOME": "relative"}, home, run_dir) == home / ".cache/vlm-pipeline"
    unusable = {"XDG_CACHE_HOME": f"{__file__}/cache"}
    assert cache_folder("", unusable, home, run_dir) == home / ".cache/vlm-pipeline"
    with caplog.at_level("INFO"):
        assert cache_folder("", {}, None, run_dir) == run_dir / BRIEF_CACHE
    assert "--cache-dir" in caplog.text
    with pytest.raises(ValueError, match=r"cache_dir .* cannot be written"):
        cache_folder(f"{__file__}/cache", {}, home, run_dir)


def test_what_is_kept_until_the_end_only_is_gone_from_a_given_run_directory(tmp_path: Path) -> None:
    given = tmp_path / "run"
    (given / "cache").mkdir(0o700, parents=True)
    given.chmod(0o700)
    left = given / BRIEF_CACHE / ".triton"
    left.mkdir(parents=True)  # by a launcher that was killed
    with RunDir(str(given), tmp_path) as run_dir:
        assert not left.exists()
        (cache_folder("", {}, None, run_dir) / "encoder").mkdir(parents=True)
    assert {entry.name for entry in given.iterdir()} == {"lock", "cache"}, "whose name is not ours"


def test_workers_without_a_home_or_a_name_get_both(tmp_path: Path) -> None:
    bare = workers_environment({"PATH": "/bin"}, None, tmp_path, nobody)
    assert (bare["HOME"], bare["USER"], bare["PATH"]) == (str(tmp_path), f"uid{os.getuid()}", "/bin")
    assert workers_environment({"HOME": "/no/such"}, None, tmp_path, nobody)["HOME"] == str(tmp_path)
    usual = workers_environment({"HOME": "/home/me", "LOGNAME": "me"}, Path("/home/me"), tmp_path, nobody)
    assert usual["HOME"] == "/home/me"
    assert "USER" not in usual
    assert "USER" not in workers_environment({}, None, tmp_path, lambda: "me")


def test_tunables_of_the_user_are_kept(tmp_path: Path) -> None:
    given = {
        "GLIBC_TUNABLES": "glibc.malloc.check=3",
        "OMP_WAIT_POLICY": "active",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    made = workers_environment(given, tmp_path, tmp_path)
    assert made["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1:glibc.malloc.check=3"
    assert "OMP_WAIT_POLICY" not in made
    assert made["GLOO_SOCKET_IFNAME"] == "eth0"


def test_a_download_that_cannot_be_kept_names_the_options() -> None:
    with pytest.raises(ValueError, match=r"no home folder.*HF_HOME.*--cache-dir.*--model"):
        find_model(ModelConfig(model="nobody/nothing"), can_keep=False)


def long_folder(parent: Path, num_bytes: int) -> Path:
    folder = parent / ("a" * (num_bytes - len(str(parent)) - 1))
    folder.mkdir()
    return folder


def test_a_long_folder_for_temporary_files_is_not_taken(short_path: Path) -> None:
    too_long, longest = long_folder(short_path, MAX_BASE + 1), long_folder(short_path, MAX_BASE)
    assert run_dir_base({}, longest) == longest
    assert run_dir_base({}, too_long) == Path("/tmp")
    assert run_dir_base({"XDG_RUNTIME_DIR": str(longest)}, Path("/var/tmp")) == longest
    assert run_dir_base({"XDG_RUNTIME_DIR": str(too_long)}, Path("/var/tmp")) == Path("/var/tmp")
    assert run_dir_base({"XDG_RUNTIME_DIR": "/no/such"}, Path("/var/tmp")) == Path("/var/tmp")
    with RunDir("", longest) as made:
        assert len(str(made)) + 1 + MAX_SOCKET_NAME == MAX_IPC_PATH


def test_where_no_place_will_do_the_option_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"/tmp.*TMPDIR.*--run-dir"):
        run_dir_base({}, tmp_path)


def test_a_given_run_directory_has_room_for_the_sockets_of_late_epochs(tmp_path: Path) -> None:
    """Else the pipeline would end with its tenth restart."""
    assert max(len(socket_name(edge, 999, 10**9)) for edge in EDGES) <= MAX_SOCKET_NAME
    with pytest.raises(ValueError, match=r"run_dir .* is too long by 1 bytes"):
        RunDir(str(long_folder(tmp_path, MAX_IPC_PATH - MAX_SOCKET_NAME)), tmp_path).__enter__()
