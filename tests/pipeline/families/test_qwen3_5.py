"""Reading of Qwen3.5's checkpoints. Sizes, times and positions are Qwen3-VL's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.families.qwen3_5 import DeltaNetInfo, Qwen3_5TextInfo
from pipeline.families.qwen3_vl import ExpertsInfo, Qwen3VisionInfo
from tests.pipeline.families.configs import QWEN3_5, changed, read

TEXT = "config.text_config"
EXPERTS = {
    "config.model_type": "qwen3_5_moe",
    f"{TEXT}.intermediate_size": None,
    f"{TEXT}.num_experts": 256,
    f"{TEXT}.num_experts_per_tok": 8,
    f"{TEXT}.moe_intermediate_size": 512,
    f"{TEXT}.shared_expert_intermediate_size": 768,
}


def test_a_published_checkpoint_is_read(tmp_path: Path) -> None:
    info = read(tmp_path, QWEN3_5)
    text, vision = info.text, info.vision
    assert isinstance(text, Qwen3_5TextInfo)
    assert isinstance(vision, Qwen3VisionInfo)
    assert text.full_layers == (3, 7, 11, 15, 19, 23)
    assert (text.head_dim, text.rotary_dim, text.rope_theta) == (256, 64, 1e7)
    assert text.delta_net == DeltaNetInfo(
        num_key_heads=16, num_value_heads=16, key_dim=128, value_dim=128, num_taps=4
    )
    assert text.mrope_section == (11, 11, 10)
    assert (text.experts, text.num_mtp_layers, text.tie_word_embeddings) == (None, 1, True)
    assert (vision.deepstack_layers, vision.embedding_width) == ((), 1024)
    assert info.eos_token_ids == (248046, 248044)
    assert info.default_sampling == {"temperature": 1.0, "top_k": 20, "top_p": 0.95}


def test_end_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    files = changed(QWEN3_5, {"generation_config.eos_token_id": 248046})
    assert read(tmp_path, files).eos_token_ids == (248046, 248044)


def test_layers_are_told_by_their_kinds_or_by_an_interval(tmp_path: Path) -> None:
    for changes, full in (
        ({f"{TEXT}.layer_types": None}, (3, 7, 11, 15, 19, 23)),
        ({f"{TEXT}.layer_types": None, f"{TEXT}.full_attention_interval": 5}, (4, 9, 14, 19)),
        ({f"{TEXT}.layer_types": ["full_attention"] + ["linear_attention"] * 23}, (0,)),
    ):
        text = read(tmp_path, changed(QWEN3_5, changes)).text
        assert isinstance(text, Qwen3_5TextInfo)
        assert text.full_layers == full


def test_experts_are_read(tmp_path: Path) -> None:
    text = read(tmp_path, changed(QWEN3_5, EXPERTS)).text
    assert isinstance(text, Qwen3_5TextInfo)
    assert text.experts == ExpertsInfo(
        num_experts=256, num_chosen=8, intermediate_size=512, layers=tuple(range(24))
    )
    assert text.intermediate_size == 768, "the shared expert's"


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (f"{TEXT}.head_dim", None, "does not say 'head_dim'"),
        (f"{TEXT}.linear_num_value_heads", None, "does not say 'linear_num_value_heads'"),
        (f"{TEXT}.linear_num_value_heads", 24, "linear_num_value_heads = 24, no multiple of 16 key heads"),
        (f"{TEXT}.linear_conv_kernel_dim", None, "does not say 'linear_conv_kernel_dim'"),
        (f"{TEXT}.rope_parameters.rope_theta", None, "does not say 'rope_theta'"),
        (f"{TEXT}.rope_parameters.partial_rotary_factor", None, "does not say 'partial_rotary_factor'"),
        (f"{TEXT}.rope_parameters.partial_rotary_factor", 1.5, "partial_rotary_factor = 1.5"),
        (f"{TEXT}.rope_parameters.mrope_interleaved", False, "mrope_interleaved = False"),
        (f"{TEXT}.rms_norm_eps", None, "does not say 'rms_norm_eps'"),
        (f"{TEXT}.attn_output_gate", False, "has attn_output_gate = False; served is True only"),
        (f"{TEXT}.mamba_ssm_dtype", "bfloat16", "has mamba_ssm_dtype = 'bfloat16'"),
        (f"{TEXT}.mtp_use_dedicated_embeddings", True, "has mtp_use_dedicated_embeddings = True"),
        (f"{TEXT}.layer_types", ["linear_attention"] * 23, "has 23 layer_types, and num_hidden_layers = 24"),
        (f"{TEXT}.layer_types", ["sliding_attention"] * 24, "of the kinds .'sliding_attention'."),
        ("config.vision_config.deepstack_visual_indexes", [1], "has deepstack_visual_indexes = .1."),
        (
            "config.vision_config.out_hidden_size",
            2048,
            "vision embeddings of 2048 numbers; the text",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_its_key(
    place: str, value: object, what: str, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=what):
        read(tmp_path, changed(QWEN3_5, {place: value}))


def test_neither_kinds_nor_an_interval_is_refused(tmp_path: Path) -> None:
    neither = {f"{TEXT}.layer_types": None, f"{TEXT}.full_attention_interval": None}
    with pytest.raises(ValueError, match="does not say 'full_attention_interval'"):
        read(tmp_path, changed(QWEN3_5, neither))


def test_experts_that_are_chosen_otherwise_are_refused(tmp_path: Path) -> None:
    for name, value in (("norm_topk_prob", False), ("decoder_sparse_step", 2), ("mlp_only_layers", [1])):
        with pytest.raises(ValueError, match=f"has {name} = "):
            read(tmp_path, changed(QWEN3_5, {**EXPERTS, f"{TEXT}.{name}": value}))
    few = {place: value for place, value in EXPERTS.items() if "shared" not in place}
    with pytest.raises(ValueError, match="does not say 'shared_expert_intermediate_size'"):
        read(tmp_path, changed(QWEN3_5, few))
