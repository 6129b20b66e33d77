"""`adapter_config.json`, as PEFT means it: which modules, which ranks and scales, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapters.settings import AdapterSettings, read_settings

Q = "model.language_model.layers.3.self_attn.q_proj"
UP = "model.language_model.layers.12.mlp.up_proj"
OF_TOWER = "model.visual.blocks.0.attn.qkv"


def settings_of(folder: Path, **changes: Any) -> AdapterSettings:
    usual = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "mlp.up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **changes}))
    return read_settings(folder)


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({}, {Q, UP}),
        ({"target_modules": "all-linear"}, {Q, UP, OF_TOWER}),
        ({"target_modules": ["proj"]}, set()),
        ({"target_modules": [Q]}, {Q}),
        ({"target_modules": r".*visual.*\.qkv|.*q_proj"}, {Q, OF_TOWER}),
        ({"target_modules": r"visual.*"}, set()),
        ({"exclude_modules": ["q_proj"]}, {UP}),
        ({"exclude_modules": r".*layers\.12.*"}, {Q}),
        ({"layers_to_transform": 3}, {Q}),
        ({"layers_to_transform": [12, 13]}, {UP}),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, {Q}),
        ({"layers_to_transform": [3], "layers_pattern": ["blocks"]}, set()),
    ],
)
def test_targets(changes: dict[str, Any], targets: set[str], tmp_path: Path) -> None:
    settings = settings_of(tmp_path, **changes)
    assert {module for module in (Q, UP, OF_TOWER) if settings.is_target(module)} == targets


@pytest.mark.parametrize(
    ("changes", "rank", "scale"),
    [
        ({}, 8, 4.0),
        ({"use_rslora": True, "r": 16, "lora_alpha": 2}, 16, 0.5),
        ({"rank_pattern": {"q_proj": 2}}, 2, 16.0),
        ({"rank_pattern": {"proj": 2, "k_proj": 3}}, 8, 4.0),
        ({"rank_pattern": {r"layers\.[0-3]\.self_attn\..*": 4, "q_proj": 2}}, 4, 8.0),
        ({"alpha_pattern": {"self_attn.q_proj": 4}, "rank_pattern": {"q_proj": 16}}, 16, 0.25),
        ({"alpha_pattern": {"^q_proj": 4}}, 8, 4.0),
        ({"lora_alpha": 2.5}, 8, 0.3125),
    ],
)
def test_ranks_and_scales(changes: dict[str, Any], rank: int, scale: float, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, **changes)
    assert (settings.rank_of(Q), settings.scale_of(Q)) == (rank, scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA' is served"),
        ({"use_dora": True}, "use_dora is True: DoRA also scales the base's weights"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: whole layers were trained"),
        ({"bias": "all"}, "bias is 'all': biases were trained"),
        ({"lora_bias": True}, "lora_bias is True: biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: no layer"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters is .*: experts are one tensor"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]: embeddings"),
        ({"layer_replication": [[0, 4]]}, r"layer_replication is \[\[0, 4\]\]: this setting is not served"),
        ({"use_qalora": True}, "use_qalora is True: this setting is not served"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"megatron_config": {"a": 1}}, "megatron_config is"),
        ({"something_new": "on"}, "something_new is 'on': this setting is not served"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which takes a part out"),
        ({"r": 0}, "r is 0, which is not above 0"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj is 1.5"),
        ({"rank_pattern": [3]}, r"rank_pattern is \[3\], which is no object"),
        ({"rank_pattern": {"(": 3}}, r"'\(' is no regular expression"),
        ({"target_modules": "("}, r"'\(' is no regular expression"),
        ({"target_modules": None}, "target_modules names no layer"),
        ({"target_modules": [3]}, r"target_modules is \[3\]"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        settings_of(tmp_path, **changes)


def test_what_is_off_is_no_reason(tmp_path: Path) -> None:
    """A newer PEFT writes all of its settings, most of them off."""
    off = {"something_new": None, "another": False, "third": {}, "use_dora": False, "modules_to_save": []}
    how = {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "megatron_core": "megatron.core"}
    assert settings_of(tmp_path, **off, **how, bias="none").rank == 8


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "is no object")])
def test_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no adapter_config"):
        read_settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path)
