"""Tensors of an adapter: each is served or refused by its name, whatever version has named it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters import Adapter, read_adapter
from pipeline.adapters.tensors import StoredTensor

LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
BASE = {
    "model.layers.0.self_attn.q_proj.weight": StoredTensor((6, 4), "BF16"),
    "visual.blocks.1.attn.qkv.weight": StoredTensor((6, 4), "BF16"),
    "visual.patch_embed.proj.weight": StoredTensor((6, 4, 2, 2), "BF16"),
    "model.layers.0.mlp.experts.3.up_proj.weight": StoredTensor((6, 4), "BF16"),
    "model.layers.0.mlp.up_proj.qweight": StoredTensor((1, 6), "I32"),
    "model.embed_tokens.weight": StoredTensor((6, 4), "BF16"),
    "lm_head.weight": StoredTensor((6, 4), "BF16"),
}


def pair(
    module: str, shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 4), (6, 2))
) -> dict[str, Tensor]:
    names = (f"base_model.model.{module}.lora_{kind}.weight" for kind in "AB")
    return {name: torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}


def written(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Adapter:
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **changes}))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return read_adapter("mine", folder)


@pytest.mark.parametrize("path", ["model.language_model.layers.0", "model.layers.0"])
@pytest.mark.parametrize("tower", ["model.visual.blocks.1", "visual.blocks.1"])
def test_names_of_old_and_new_versions(path: str, tower: str, tmp_path: Path) -> None:
    tensors = {**pair(f"{path}.self_attn.q_proj"), **pair(f"{tower}.attn.qkv")}
    adapter = written(tmp_path, tensors, target_modules=["q_proj", "qkv"])
    assert set(adapter.modules) == {"model.layers.0.self_attn.q_proj", "visual.blocks.1.attn.qkv"}
    module = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert module[2:] == (2, 1.5, 6, 4)
    assert module.a == f"base_model.model.{path}.self_attn.q_proj.lora_A.weight"
    assert adapter.adapts_tower
    assert adapter.tower_key == adapter.digest
    adapter.check_fits(BASE)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(6)}, "lora_magnitude_vector is not one of those"),
        ({"base_model.model.lm_head.weight": torch.ones(6, 4)}, "base_model.model.lm_head.weight is not one"),
        ({"base_model.model.x.lora_embedding_A": torch.ones(2, 4)}, "lora_embedding_A is not one"),
        ({f"{LAYER}.lora_B.bias": torch.ones(6)}, "lora_B.bias is not one"),
        ({"layers.0.x.lora_A.weight": torch.ones(2, 4)}, "layers.0.x.lora_A.weight is not one"),
        ({"base_model.model.y.k_proj.lora_A.weight": torch.ones(2, 4)}, "k_proj.lora_A.weight has no"),
        ({"base_model.model.y.k_proj.lora_B.weight": torch.ones(6, 2)}, "k_proj.lora_B.weight has no"),
        (pair("model.y.v_proj"), "v_proj.lora_A.weight is of a layer that target_modules does not name"),
        (pair("model.layers.0.self_attn.q_proj"), "is there twice"),
        (pair("model.layers.0.mlp.experts"), "lora_A.weight: adapters of experts are not served"),
        (pair("model.layers.0.mlp.experts.3.k_proj"), "adapters of experts are not served"),
        (pair("model.embed_tokens"), "adapters of input and output embeddings are not served"),
        (pair("lm_head"), "adapters of input and output embeddings are not served"),
        (pair("y.k_proj", ((3, 4), (6, 3))), "the ranks 3 and 3, adapter_config.json says 2"),
        (pair("y.k_proj", ((2, 4), (6, 3))), "the ranks 2 and 3"),
        (pair("y.k_proj", ((2, 4, 3, 3), (6, 2, 1, 1))), "has 4 axes, not two"),
        (
            {name: tensor.to(torch.int8) for name, tensor in pair("y.k_proj").items()},
            "is stored as I8",
        ),
    ],
)  # fmt: skip
def test_no_tensor_is_ignored(more: Mapping[str, Tensor], named: str, tmp_path: Path) -> None:
    tensors = {**pair("model.language_model.layers.0.self_attn.q_proj"), **more}
    with pytest.raises(ValueError, match=rf"^adapter 'mine' in .*: .*{named}"):
        written(tmp_path, tensors, target_modules=["q_proj", "k_proj"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.9.self_attn.q_proj", "but the model has no layer model.layers.9.self_attn.q_proj"),
        ("model.visual.patch_embed.proj", "but visual.patch_embed.proj of the model is no linear layer"),
    ],
)
def test_layers_that_take_none(module: str, message: str, tmp_path: Path) -> None:
    adapter = written(tmp_path, pair(module))
    with pytest.raises(ValueError, match=rf"^adapter 'mine' has the tensor .*lora_A.weight.*{message}"):
        adapter.check_fits(BASE)


def test_sizes_of_another_model(tmp_path: Path) -> None:
    adapter = written(tmp_path, pair("model.layers.0.self_attn.q_proj", ((2, 5), (6, 2))))
    with pytest.raises(ValueError, match=r"lora_B\.weight for 6 outputs of 5 inputs, but .* has 6 of 4"):
        adapter.check_fits(BASE)


def test_a_packed_layer_is_compared_by_its_worker(tmp_path: Path) -> None:
    written(tmp_path, pair("model.layers.0.mlp.up_proj", ((2, 5), (7, 2)))).check_fits(BASE)


def test_other_files_have_another_digest(tmp_path: Path) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj")
    first = written(tmp_path, tensors)
    assert first.digest == read_adapter("other name", tmp_path).digest
    assert first.tower_key == b"", "pictures are the base's"
    digests = {first.digest, written(tmp_path, tensors, lora_alpha=4).digest}
    os.utime(tmp_path / "adapter_model.safetensors", (1, 1))
    digests.add(read_adapter("mine", tmp_path).digest)
    save_file(load_file(first.path), tmp_path / "part")
    (tmp_path / "part").replace(first.path)
    digests.add(read_adapter("mine", tmp_path).digest)
    assert len(digests) == 4


def test_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^adapter 'x' in '.*nowhere': this is no folder"):
        read_adapter("x", tmp_path / "nowhere")
    written(tmp_path, pair("model.layers.0.self_attn.q_proj"))
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"has {len(whole) - 4} bytes, by its header {len(whole)}"):
        read_adapter("x", tmp_path)
    file.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no file of safetensors"):
        read_adapter("x", tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"there is no adapter_model.safetensors \(adapter_model.bin is not"):
        read_adapter("x", tmp_path)
