"""Towers that are quantised too: as the dense one of the maker's formula, also where an engine gets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dequantised import dense_tensors
from tests.workers.vit.test_quantization import features, linears
from tests.workers.vit.tiny_towers import TOWERS
from tools.random_checkpoint.quantized import RECIPES
from workers.nn.weights.dense import Dense, TorchLinear
from workers.nn.weights.grouped import GroupedLinear
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("format", ["fp8-block", "compressed-fp8", "compressed-w8a8"])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_quantised_tower(kind: str, format: str, tmp_path: Path) -> None:
    """Its sizes are no multiple of the blocks."""
    tiny, recipe = TOWERS[kind](tmp_path / "dense"), RECIPES[format](32)
    tensors = {}
    for name, tensor in load_file(tiny.folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name == module or tensor.ndim != 2 or "pos_embed" in name:
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{part}": made for part, made in recipe.layer(module, tensor).items()}
    quantised, dense, settings = tmp_path / "q", tmp_path / "d", recipe.settings([])
    for folder in (quantised, dense):
        folder.mkdir()
    save_file(tensors, quantised / "model.safetensors")
    (quantised / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file(dense_tensors(tensors, settings), dense / "model.safetensors")
    expected = features(tiny, tiny._replace(folder=dense).encoder())
    encoder = tiny._replace(folder=quantised).encoder()
    torch.testing.assert_close(features(tiny, encoder), expected, rtol=1e-4, atol=1e-4)
    kinds = {type(layer) for path, layer in linears(encoder) if path != ".patch_embed"}
    assert kinds == {GroupedLinear}
    weights = open_weights(quantised, torch.float32, CPU, dense=Dense(TorchLinear))
    exported = tiny.tower.encoder(tiny.info, weights)
    assert {type(layer) for _, layer in linears(exported)} == {TorchLinear}
    torch.testing.assert_close(features(tiny, exported), expected, rtol=1e-4, atol=1e-4)
