"""Random checkpoints are laid out as the published ones: transformers reads them, and so do our families."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from launcher.checkpoints import find_model
from launcher.stored_weights import check_weights
from pipeline.adapters import read_adapter
from pipeline.adapters.tensors import tensors_in
from pipeline.config import Config, ModelConfig
from pipeline.families import read_model_info
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.random_checkpoint.quantized import quantize_checkpoint
from tools.random_checkpoint.settings import write_settings
from tools.random_checkpoint.shapes import LARGE_VOCABULARY
from tools.random_checkpoint.tokenizer import write_tokenizer
from tools.random_checkpoint.weights import hub_shapes

TINY = [name for name in SHAPES if name.endswith("tiny")]
# Billions of parameters of the published models.
SIZES = {
    "2b": 2.209, "7b": 8.291, "qwen2.5-vl-3b": 3.755, "qwen2.5-vl-7b": 8.292, "qwen2.5-vl-32b": 33.45,
    "qwen2.5-vl-72b": 73.41, "qwen3-vl-2b": 2.127, "qwen3-vl-4b": 4.438, "qwen3-vl-8b": 8.767,
    "qwen3-vl-32b": 33.36, "qwen3-vl-30b-a3b": 31.07, "qwen3-vl-235b-a22b": 235.7,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"at": "Köln"}}}


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, request.param)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_settings_are_read_by_our_family_and_by_transformers(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_settings(tmp_path, shape)
    info, config = read_model_info(tmp_path), AutoConfig.from_pretrained(tmp_path)
    text = config.get_text_config()
    assert info.family.model_type == config.model_type == shape.family
    assert info.text.head_dim == shape.head_dim
    assert info.text.num_layers == text.num_hidden_layers
    assert info.text.mrope_section == tuple(text.rope_parameters["mrope_section"])
    assert sum(info.text.mrope_section) == getattr(info.text, "rotary_dim", info.text.head_dim) // 2
    assert info.text.rope_theta == text.rope_parameters["rope_theta"]
    assert info.text.rms_norm_eps == text.rms_norm_eps
    assert info.text.tie_word_embeddings == config.tie_word_embeddings == shape.is_tied
    assert info.image_token_id == config.image_token_id


@pytest.mark.parametrize("name", SIZES)
def test_a_true_shape_has_as_many_parameters_as_the_published_model(name: str, tmp_path: Path) -> None:
    write_settings(tmp_path, SHAPES[name])
    count = sum(math.prod(shape) for shape in hub_shapes(tmp_path).values()) / 1e9
    assert count == pytest.approx(SIZES[name], rel=2e-3)


def test_the_benchmark_of_experts_has_less_than_6_gb(tmp_path: Path) -> None:
    write_settings(tmp_path, SHAPES["moe-64"])
    assert 2 * sum(math.prod(shape) for shape in hub_shapes(tmp_path).values()) < 6e9


def test_transformers_finds_all_tensors_and_no_others(tiny: Path) -> None:
    _, loading = AutoModelForImageTextToText.from_pretrained(tiny, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tensors_have_the_names_and_layouts_of_the_hub(tmp_path: Path) -> None:
    def names(shape: str, **options: bool) -> set[str]:
        make_checkpoint(tmp_path / shape, shape, **options)
        return set(json.loads((tmp_path / shape / "model.safetensors.index.json").read_text())["weight_map"])

    assert {"visual.blocks.0.mlp.gate_proj.bias", "model.layers.0.self_attn.q_proj.bias"} < names(
        "qwen2.5-vl-tiny"
    )
    layers = "model.language_model.layers"
    dense = {"model.visual.deepstack_merger_list.1.norm.bias", f"{layers}.1.mlp.up_proj.weight"}
    fused = {f"{layers}.0.mlp.gate.weight", f"{layers}.0.mlp.experts.gate_up_proj"}
    assert dense | fused < names("qwen3-vl-moe-tiny")
    shapes = hub_shapes(tmp_path / "qwen3-vl-moe-tiny")
    assert shapes[f"{layers}.2.mlp.experts.gate_up_proj"] == (4, 256, 2 * 192)
    assert shapes[f"{layers}.2.mlp.experts.down_proj"] == (4, 192, 256)
    split = names("qwen3-vl-moe-tiny", has_split_experts=True)
    assert {f"{layers}.0.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")} < split
    assert not any("gate_up_proj" in name for name in split)


@pytest.mark.parametrize("name", [*TINY, "2b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_every_id_is_a_word(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_tokenizer(tmp_path, shape)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == shape.vocab_size
    assert all(tokenizer.decode_batch([[number] for number in range(shape.vocab_size)], False))
    if shape.vocab_size >= LARGE_VOCABULARY:
        ids = {
            151643: "<|endoftext|>",
            151645: "<|im_end|>",
            151652: "<|vision_start|>",
            151655: "<|image_pad|>",
        }
        assert {number: tokenizer.id_to_token(number) for number in ids} == ids
    text = "It’s 12 o'clock,\n\n  in 東京! <0.3 seconds>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokens = AutoTokenizer.from_pretrained(tmp_path).encode(text)
    assert tokens == tokenizer.encode(text).ids


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}, {"type": "video"}]},
    {"role": "assistant", "content": "Me."},
]
SHOWN = (
    "<|im_start|>user\n{}<|vision_start|><|image_pad|><|vision_end|>Who?{}<|vision_start|><|video_pad|>"
    "<|vision_end|><|im_end|>\n<|im_start|>assistant\n{}Me.<|im_end|>\n"
)
DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_a_chat_is_rendered_as_by_the_familys_template(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    family = json.loads((tiny / "config.json").read_text())["model_type"]
    default = "" if "qwen3" in family else DEFAULT
    thought, begin = ("<think>\n\n</think>\n\n", "<think>\n") if "qwen3_5" in family else ("", "")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == default + SHOWN.format("", "", thought)
    with_ids = tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_vision_id=True, add_generation_prompt=True
    )
    shown = SHOWN.format("Picture 1: ", "Video 1: ", thought)
    assert with_ids == default + shown + "<|im_start|>assistant\n" + begin
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + SHOWN.format("", "", thought)
    assert tokenizer.apply_chat_template(system, tokenize=False) == expected
    stored = json.loads((tiny / "chat_template.json").read_text())["chat_template"]
    assert stored == tokenizer.chat_template


def test_tools_are_rendered_as_by_qwen3_vl(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, SHAPES["qwen3-vl-tiny"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "content": "A cat."},
        {"role": "tool", "content": [{"type": "image"}]},
    ]
    expected = """<|im_start|>system
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "look", "parameters": {"at": "Köln"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Look.<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "look", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
A cat.
</tool_response>
<tool_response>
<|vision_start|><|image_pad|><|vision_end|>
</tool_response><|im_end|>
"""  # noqa: E501
    assert tokenizer.apply_chat_template(chat, tools=[TOOL], tokenize=False) == expected


def test_the_command_makes_fewer_layers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.random_checkpoint", "qwen3-vl-tiny", str(tmp_path)]
    subprocess.run([*command, "--layers", "2", "--lora", "a", "b", "--lora-rank", "3"], check=True)
    assert read_model_info(tmp_path).text.num_layers == 2
    a, b = (read_adapter(name, tmp_path.with_name(f"{tmp_path.name}-{name}")) for name in "ab")
    for adapter in (a, b):
        adapter.check_fits(tensors_in(tmp_path))
        assert {module.rank for module in adapter.modules.values()} == {3}
    assert a.path.read_bytes() != b.path.read_bytes()
    AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    # Deepstack adds to two.
    refused = subprocess.run([*command, "--layers", "1"], check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "from 2 to 3 layers" in refused.stderr


@pytest.mark.parametrize(("format", "words"), [("nvfp4", "as NVFP4"), ("gguf", "is in GGUF")])
def test_formats_that_are_refused(format: str, words: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "dense", "tiny")
    folder = quantize_checkpoint(tmp_path / "dense", tmp_path / "q", format)
    with pytest.raises(ValueError, match=words):
        check_weights(Config(), find_model(ModelConfig(model=str(folder))).folder)


def test_the_command_quantises(tmp_path: Path) -> None:
    """With the tower and the output layer left as they are, as makers do."""
    folder = tmp_path / "q"
    command = [sys.executable, "-m", "tools.random_checkpoint", "qwen3.5-moe-tiny", str(folder)]
    refused = subprocess.run([*command, "--quantized", "awq"], check=False, capture_output=True, text=True)
    assert "AWQ with groups of 128 cannot have model.language_model.layers." in refused.stderr
    subprocess.run([*command, "--quantized", "awq", "--group-size", "64"], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["q"], "nothing of the dense one stays"
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"][0] == "visual"
    kinds = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
    names = set()
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            names.add(name)
            assert tensor.dtype == kinds.get(name.rpartition(".")[2], torch.bfloat16), name
    layer = "model.language_model.layers.0"
    assert f"{layer}.mlp.experts.3.down_proj.qweight" in names
    assert f"{layer}.linear_attn.in_proj_qkv.qzeros" in names
    assert {f"{layer}.mlp.gate.weight", "mtp.fc.weight", f"{layer}.linear_attn.in_proj_b.weight"} <= names
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == names
