"""DashInfer-VLM's options, as this server's."""

from __future__ import annotations

import configparser
import importlib
from pathlib import Path

import pytest

from launcher.cli import parse
from launcher.dashinfer import ENGINES, NO_QUANTIZATION, QUANTIZATIONS, main, translate

SETUP = Path(__file__).parents[2] / "setup.cfg"


def test_the_command_is_installed_under_its_name() -> None:
    config = configparser.ConfigParser()
    config.read(SETUP)
    name, _, place = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "dashinfer_vlm_serve"
    assert getattr(importlib.import_module(module), function) is main


def test_options_are_translated() -> None:
    arguments = [
        "--model",
        "some/name",
        "--host",
        "0.0.0.0",
        "--port",
        "9000",
        "--vision_engine",
        "transformers",
        "--device",
        "cpu",
        "--max_length",
        "4096",
        "--max_batch",
        "16",
        "--parallel_size",
        "2",
        "--enable-prefix-cache",
        "--quant-type",
        "a8w8",
        "--dtype",
        "float32",
        "--min-pixels",
        "3136",
        "--max-pixels",
        "802816",
        "--api-keys",
        "a,b",
        "--ssl",
    ]
    origins = [
        "--allowed-origins",
        '["https://a.example", "https://b.example"]',
        "--allowed-methods",
        '["*"]',
    ]
    environment = {"SSL_KEYFILE": "key.pem", "SSL_CERTFILE": "cert.pem"}
    config = parse(translate([*arguments, *origins], environment))
    model, api, preprocess, llm = config.model, config.api, config.preprocess, config.llm
    assert (model.model, model.served_model_name) == ("some/name", ("model", "some/name"))
    assert (model.download_from, model.device, model.dtype) == ("modelscope", "cpu", "float32")
    assert (api.host, api.port, api.api_key, api.allowed_hosts) == ("0.0.0.0", 9000, ("a", "b"), ())
    assert (api.ssl_keyfile, api.ssl_certfile) == ("key.pem", "cert.pem")
    assert api.allowed_origins == ("https://a.example", "https://b.example")
    assert (preprocess.min_pixels, preprocess.max_pixels) == (3136, 802816)
    assert (model.max_model_len, llm.max_num_seqs, llm.tp, llm.quantization) == (4096, 16, 2, "int8")
    assert (config.vit.vit_engine, llm.prefix_caching) == ("torch", True)


def test_options_of_this_server_may_stand_beside(tmp_path: Path) -> None:
    ours = ["--allowed-local-media-path", str(tmp_path), "--served-model-name", "mine", "--vit", "2"]
    config = parse(translate(["--model", str(tmp_path), *ours], {}))
    assert config.preprocess.allowed_local_media_path == str(tmp_path)
    assert (config.model.served_model_name, config.num_vits) == (("mine",), 2)
    assert config.model.download_from == "huggingface"  # a folder is not downloaded
    # DashInfer's clients ask for 0.0.0.0 unless told otherwise.
    assert config.api.allowed_hosts == ("0.0.0.0",)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *((["--quant-type", kind], f"--quant-type {kind}") for kind in NO_QUANTIZATION),
        (["--quant-type", "mystery"], "--quant-type mystery"),
        (["--vision_engine", "mystery"], "--vision_engine"),
        (["--allow-credentials"], "--allow-credentials"),
        (["--allowed-methods", '["GET"]'], "--allowed-methods"),
        (["--allowed-headers", '["X-Mine"]'], "--allowed-headers"),
        (["--allowed-origins", "no JSON"], "--allowed-origins"),
        (["--allowed-origins", "5"], "--allowed-origins"),
        (["--allowed-origins", '"https://a.example"'], "--allowed-origins"),
        (["--api_keys", ""], "--api_keys has no key"),  # a variable of the shell that is not set
        (["--api_keys", ","], "--api_keys has no key"),
        (["--ssl"], "SSL_KEYFILE"),
    ],
)
def test_what_has_no_equivalent_is_refused_by_name(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        translate(["--model", "m", *arguments], {})
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_unknown_options_are_refused_by_this_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(translate(["--model", "m", "--mystery", "1"], {}))
    assert "--mystery" in capsys.readouterr().err


def test_every_choice_of_an_engine_or_of_bits_is_one_here() -> None:
    for engine in ENGINES:
        assert parse(translate(["--model", "m", "--vision-engine", engine], {})).vit.vit_engine
    for kind in QUANTIZATIONS:
        assert parse(translate(["--model", "m", "--quant_type", kind], {})).llm.quantization != "none"
