from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from launcher.announcement import example_request
from launcher.api_keys import with_keys
from launcher.checkpoints import find_model
from pipeline.config import ApiConfig, ApiKey, Config, ModelConfig
from pipeline.config.api import MAX_KEY_BYTES
from pipeline.process.fork_server import MAX_REQUEST


def keys_of(config: ApiConfig) -> list[tuple[str, str]]:
    return [(key.name, key.key) for key in config.keys]


def test_keys_of_the_file_the_environment_and_the_command_line_count(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf# who\r\n\r\n alice : a:1 \r\nalice:a2\r\n  # bob:b0\r\nbob:b1#1\r\n")
    path.chmod(0o600)
    config = with_keys(ApiConfig(api_key=("plain:c",), api_key_file=str(path)), "carol:d, e\n,")
    assert keys_of(config) == [
        ("carol", "d"),
        (ApiKey.unnamed("e").name, "e"),
        ("alice", "a:1"),
        ("alice", "a2"),
        ("bob", "b1#1"),
        (ApiKey.unnamed("plain:c").name, "plain:c"),
    ]
    assert "a:1" not in repr(config.named_keys)


def test_without_keys_there_are_none() -> None:
    assert with_keys(ApiConfig(), "").keys == ()
    assert with_keys(ApiConfig(), "  ").keys == ()


@pytest.mark.parametrize(
    ("content", "variable", "words"),
    [
        ("# nothing\n", "", "there is no key in .*keys"),
        ("alice:a\nSECRET\n", "", "line 2 of .*keys is not NAME:KEY"),
        ("al ice:SECRET\n", "", "line 1 of .*keys: a name has"),
        (":SECRET\n", "", "line 1 of .*keys: a name has"),
        ("alice:\n", "", "'alice' must have printable characters"),
        ("alice:SEC RET\n", "", "'alice' must have printable characters"),
        ("alice:SECRET\nbob:SECRET\n", "", "'alice' and 'bob' are the same"),
        ("alice:SECRET\n", "bob:SECRET", "'bob' and 'alice' are the same"),
        ("alice:" + "SECRET" * MAX_KEY_BYTES, "", "bytes together"),
        ("alice:a\n", ",,", "no key in VLM_API_KEY"),
    ],
)
def test_what_is_no_key_is_told_without_showing_it(
    content: str,
    variable: str,
    words: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as refusal:
        with_keys(ApiConfig(api_key_file=str(path)), variable)
    assert "SECRET" not in str(refusal.value)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="must have printable characters"):
        ApiConfig(api_key=("",))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="keys"):
        with_keys(ApiConfig(api_key_file=str(tmp_path / "keys")), "")


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_everybody_may_read_is_warned_of(
    mode: int,
    warns: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:secret")
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        with_keys(ApiConfig(api_key_file=str(path)), "")
    assert (str(path) in caplog.text) is warns
    assert "secret" not in caplog.text


def test_arguments_and_environment_show_no_key() -> None:
    program = """
        import os, sys
        from pathlib import Path
        from launcher.api_keys import hide
        hide(["secret-1", "secret-2", "8"])
        os.environ.pop("VLM_API_KEY")
        for name in ("cmdline", "environ"):
            sys.stdout.write(Path(f"/proc/self/{name}").read_text().replace("\\0", " ") + "\\n")
    """
    arguments = ["--api-key", "secret-1", "--admin-key=secret-2", "--max-num-seqs", "88", "secret-1x"]
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={"A": "1", "VLM_API_KEY": "bob:secret-3", "B": "2", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    lines = shown.splitlines()
    assert "--api-key ******** --admin-key=******** --max-num-seqs 88 secret-1x" in shown
    assert lines[-1].startswith("A=1 VLM_API_KEY=************ B=2 ")


def test_the_example_shows_no_key() -> None:
    model = find_model(ModelConfig())
    assert ' -H "Authorization: Bearer YOUR_KEY" ' in example_request("http://x", model, key="YOUR_KEY")
    assert "Authorization" not in example_request("http://x", model, key="")


@pytest.mark.parametrize(
    ("variable", "is_key"), [("secret", True), ("name:secret", False), ("one,two", False), ("", False)]
)
def test_the_variable_stands_for_a_key_only_where_it_is_one(variable: str, is_key: bool) -> None:
    assert with_keys(ApiConfig(api_key=("other",)), variable).key_is_in_environment == is_key


def test_so_many_keys_as_are_taken_can_be_told_to_the_workers() -> None:
    """2700 short ones passed the check, and stopped the launcher by an assertion."""
    named = tuple(ApiKey(f"n{number}", f"k{number}") for number in range(1700))
    config = Config(api=ApiConfig(named_keys=named))
    assert len(msgspec.msgpack.encode(config)) < MAX_REQUEST - 8192
    with pytest.raises(ValueError, match="API keys"):
        ApiConfig(named_keys=tuple(ApiKey(f"n{number}", f"k{number}") for number in range(2700)))
