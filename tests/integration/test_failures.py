"""What happens when a worker dies, fails to start, or the launcher goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.integration.conftest import LIMITS
from tests.servers import Server, wait_until_dead


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        model="embedded-shapes", messages=[{"role": "user", "content": "Hello"}], **options
    )


def test_the_end_of_the_fork_server_ends_the_launcher_with_a_reason() -> None:
    with Server(*LIMITS) as server, server.client() as client:
        stream = ask(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        os.kill(server.children["server"], signal.SIGKILL)
        assert server.wait() == 1
        assert "the fork server has ended" in server.output
        with pytest.raises(openai.APIError):
            list(stream)
        server.assert_nothing_left()


def broken_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:16] = b"\xff" * 8
    (folder / "model.safetensors").write_bytes(data)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken_weights, "model.safetensors is no file of safetensors"),
        (broken_config, "'llama'; served are qwen2_5_vl, qwen2_vl, "),
        (no_template, "has no chat template"),
    ],
)
def test_a_worker_that_cannot_start_ends_the_launcher_with_its_own_error(
    spoil: Any, words: str, tmp_path: Path
) -> None:
    spoil(make_checkpoint(tmp_path / "model"))
    with Server("--model", str(tmp_path / "model"), expects_failure=True) as server:
        assert server.wait() == 1
        assert words in server.output
        server.assert_nothing_left()


def test_a_model_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with Server("--tp", "3", "--vit", "1", expects_failure=True) as server:
        assert server.wait() == 1
        assert "tp 3 does not divide the model's 4 attention heads" in server.output
        assert "python -m launcher.doctor says what this machine can do" in server.output


def test_an_engine_that_has_only_dense_weights_is_refused_for_others() -> None:
    with Server("--quantization", "int8", "--vit-engine", "onnxruntime", expects_failure=True) as server:
        assert server.wait() == 1
        assert "vit_engine 'onnxruntime' computes dense weights, not int8" in server.output


def test_a_context_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with Server("--max-model-len", "8000", "--kv-cache-gib", "0.001", expects_failure=True) as server:
        assert server.wait() == 1
        assert "there is room for 0.001" in server.output


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with Server("--port", str(taken.getsockname()[1]), expects_failure=True) as server:
            assert server.wait() == 1
            assert (
                f"cannot listen on 127.0.0.1, port {taken.getsockname()[1]}: Address already in use"
                in server.output
            )


def test_ctrl_c_lets_open_requests_finish_and_refuses_new_ones() -> None:
    with Server(*LIMITS) as server, server.client() as client:
        texts: list[str] = []
        started = threading.Event()

        def stream() -> None:
            for chunk in ask(client, max_tokens=150, stream=True, extra_body={"ignore_eos": True}):
                started.set()
                texts.extend(choice.finish_reason for choice in chunk.choices if choice.finish_reason)

        thread = threading.Thread(target=stream)
        thread.start()
        assert started.wait(30)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        with pytest.raises(openai.APIError) as caught:
            ask(client, max_tokens=2)
        if isinstance(caught.value, openai.APIStatusError):
            assert caught.value.status_code == 503
            assert caught.value.response.headers["Retry-After"]
        thread.join(30)
        assert texts == ["length"]
        assert server.wait() == 0


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Server("--shutdown-timeout", "60", "--max-model-len", "8192") as server, server.client() as client:
        stream = ask(client, max_tokens=8000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 8
        stream.close()


@pytest.mark.parametrize(("number", "delay_s"), [(signal.SIGTERM, 0.4), (signal.SIGINT, 1.5)])
def test_a_signal_to_the_whole_group_during_start_ends_all_in_order(
    number: signal.Signals, delay_s: float
) -> None:
    """As Ctrl-C in a terminal, or a service manager, sends it."""
    with Server(*LIMITS, expects_failure=True) as server:
        deadline = time.monotonic() + 20
        while "embedded model" not in server.output and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay_s)
        os.killpg(server.process.pid, number)
        assert server.wait() == 0, server.output
        server.assert_nothing_left()


def test_a_signal_to_the_whole_group_drains_like_one_to_the_launcher() -> None:
    with Server(*LIMITS) as server, server.client() as client:
        stream = ask(client, max_tokens=150, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        os.killpg(server.process.pid, signal.SIGTERM)
        reasons = [
            choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason
        ]
        assert reasons == ["length"]
        assert server.wait() == 0


def test_nothing_of_a_killed_launcher_lives_on() -> None:
    with Server(*LIMITS) as server:
        server.process.kill()
        assert wait_until_dead(server.children, 5) == []
        server.process.wait()
        assert (server.run_dir / "lock").exists()
        for left in server.run_dir.iterdir():  # the next test is about them
            left.unlink()


def test_a_run_directory_with_the_leftovers_of_a_killed_launcher_is_taken_over(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "launcher", "--port", "0", "--run-dir", str(run_dir), *LIMITS]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert first.stdout is not None
    assert any(line.startswith("Serving") for line in first.stdout)
    first.kill()
    first.wait()
    first.stdout.close()
    assert len(list(run_dir.iterdir())) > 3
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as second:
        assert second.stdout is not None
        assert any(line.startswith("Serving") for line in second.stdout)
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 0
    assert [entry.name for entry in run_dir.iterdir()] == ["lock"]
