"""Command lines and requests of each server, and what is told of one that is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launcher.cli import parse
from tools.bench_serving import Workload
from tools.peers.adapters import (
    Environment,
    Limits,
    LlamaCpp,
    OpenVino,
    Ours,
    Peer,
    TransformersServe,
    Vllm,
    make,
)
from tools.random_checkpoint import make_checkpoint

LIMITS = Limits(num_cores=4, kv_bytes_per_token=1024)
MODEL = Path("/models/small")
BODY = Workload(num_output=5).body([{"role": "user", "content": []}])


def options(peer: Peer) -> dict[str, str]:
    """Of its command line, with what stands behind each."""
    command = peer.command(MODEL, 8001, LIMITS)
    return {name: after for name, after in zip(command, [*command[1:], ""], strict=True) if name[0] == "-"}


def test_the_limits_are_the_same_for_all() -> None:
    assert LIMITS.num_tokens == 16_384
    assert LIMITS.kv_bytes == 16 << 20
    ours, vllm = options(Ours()), options(Vllm("/v/bin/python"))
    assert float(ours["--kv-cache-gib"]) == 1 / 64
    assert ours["--max-num-seqs"] == vllm["--max-num-seqs"] == "8"
    assert ours["--max-model-len"] == vllm["--max-model-len"] == "2048"
    assert "--no-prefix-caching" in ours
    assert "--no-enable-prefix-caching" in vllm
    assert vllm["--kv-cache-memory-bytes"] == str(16 << 20)
    assert ours["--dtype"] == vllm["--dtype"] == "bfloat16"
    llama = options(LlamaCpp("/l/llama-server", None, "python", "bf16"))
    assert (llama["-t"], llama["-tb"], llama["-np"], llama["-c"]) == ("4", "4", "8", "16384")
    openvino = options(OpenVino("/o/bin/python"))
    found = openvino["--threads"], openvino["--max-num-seqs"], openvino["--num-tokens"]
    assert found == ("4", "8", "16384")
    assert openvino["--precision"] == "bf16"


def test_our_launcher_takes_our_options() -> None:
    command = Ours("int8", ["--max-num-batched-tokens", "256"]).command(MODEL, 8001, LIMITS)
    config = parse(command[3:])
    assert config.llm.quantization == "int8"
    assert config.llm.max_num_batched_tokens == 256
    assert config.llm.prefix_caching is False
    assert config.api.port == 8001


def test_a_format_of_files_is_made_of_the_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tiny", "tiny")
    peer = Ours("awq")
    model = peer.prepare(tmp_path / "tiny", tmp_path)
    assert json.loads((model / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    assert parse(peer.command(model, 8001, LIMITS)[3:]).llm.quantization == "none"
    assert Ours("int8").prepare(tmp_path / "tiny", tmp_path) == tmp_path / "tiny"


@pytest.mark.parametrize(
    ("peer", "key", "is_quantized"),
    [
        (Ours(), "ours", False),
        (Ours("int8"), "ours-int8", True),
        (Ours("awq"), "ours-awq", True),
        (LlamaCpp("llama-server", None, "python"), "llama-bf16", False),
        (LlamaCpp("llama-server", None, "python", "f16"), "llama-f16", False),
        (LlamaCpp("llama-server", None, "python", "q4_k_m"), "llama-q4_k_m", True),
    ],
)
def test_keys_tell_what_is_compared_with_what(peer: Peer, key: str, is_quantized: bool) -> None:
    assert (peer.key, peer.is_quantized) == (key, is_quantized)


def test_threads_are_the_cores() -> None:
    assert Vllm("/v/bin/python").environment(LIMITS)["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    for peer in (Ours(), Vllm("/v/bin/python"), TransformersServe("/t/bin/python")):
        assert peer.environment(LIMITS)["OMP_NUM_THREADS"] == "4"


def test_requests_are_in_the_words_of_each(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_p": 0.8}')
    assert Ours().adapt(BODY, MODEL) == BODY
    assert Vllm("python").adapt(BODY, MODEL)["model"] == str(MODEL)
    assert LlamaCpp("llama-server", None, "python").adapt(BODY, MODEL)["cache_prompt"] is False
    body = TransformersServe("python").adapt(BODY, tmp_path)
    assert {"ignore_eos", "stream_options"}.isdisjoint(body), "it refuses unknown fields"
    wishes = json.loads(body["generation_config"])
    assert wishes == {"do_sample": False, "min_new_tokens": 5, "eos_token_id": [2, 3]}
    for peer in (Ours(), Vllm("python"), OpenVino("python"), LlamaCpp("llama-server", None, "python")):
        assert peer.adapt(BODY, MODEL)["ignore_eos"] is True


def test_who_is_missing_is_told() -> None:
    assert Ours().missing() == ""
    for peer in (Vllm("/no/python"), OpenVino("/no/python"), TransformersServe("/no/python")):
        assert peer.missing() == "there is no /no/python"
    assert LlamaCpp("/no/server", None, "python").missing() == "there is no /no/server"
    assert Environment.of(sys.executable).missing("json", "no_such_module").endswith("has no no_such_module")


def test_a_quantised_model_needs_a_quantiser(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert LlamaCpp(str(server), None, "python").missing() == ""
    assert LlamaCpp(str(server), None, "python", "q4_k_m").missing().endswith("llama-quantize")


def test_a_model_is_made_once_and_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(RuntimeError, match="model was not made"):
        make(out, lambda part: ["sh", "-c", f"touch {part}; false"])
    assert not out.exists()
    make(out, lambda part: ["sh", "-c", f"echo first > {part}"])
    make(out, lambda part: ["sh", "-c", f"echo second > {part}"])
    assert out.read_text() == "first\n"
    with pytest.raises(RuntimeError, match="--llama-converter"):
        LlamaCpp("llama-server", None, "python").prepare(MODEL, tmp_path)
