"""Which output layer a decoder takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.workers.nn.weights.test_stored import Stored, tensors_of
from tools.random_checkpoint.quantized import RECIPES
from workers.llm.models.vocabulary import Vocabulary
from workers.llm.parallel import TensorParallel
from workers.nn.weights.registry import open_weights
from workers.nn.weights.shard import Shard

VOCAB, HIDDEN = 40, 16


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("stored", ["none", "the table", "another"])
def test_a_stored_output_layer_counts_tied_or_not(is_tied: bool, stored: str, tmp_path: Path) -> None:
    """As in transformers: fine-tunes may have trained it, and left the flag as it was."""
    table, another = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    heads = {"the table": table.clone(), "another": another}
    tensors = {"model.embed_tokens.weight": table}
    if stored in heads:
        tensors["lm_head.weight"] = heads[stored]
    save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path, torch.float32, torch.device("cpu"))
    shard = Shard.split_padded(VOCAB, 0, 1)
    vocabulary = Vocabulary(weights, shard, VOCAB, is_tied)
    x = torch.randn(3, HIDDEN)
    expected = x @ heads.get(stored, table).T
    torch.testing.assert_close(vocabulary.logits(x, None, TensorParallel()), expected)


@pytest.mark.parametrize("format", ["gptq", "compressed-fp8"])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("what", ["the output layer", "the table"])
def test_either_may_be_quantised(what: str, is_tied: bool, format: str, tmp_path: Path) -> None:
    recipe, table, head = RECIPES[format](16), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    module = "lm_head" if what == "the output layer" else "model.embed_tokens"
    tensors = tensors_of(recipe, module, head if module == "lm_head" else table)
    if module == "lm_head":
        tensors["model.embed_tokens.weight"] = table
    elif not is_tied:
        tensors["lm_head.weight"] = head
    stored = Stored(tmp_path, recipe.settings([]), tensors)
    wide, x = stored.matrix(module), torch.randn(3, HIDDEN)
    parts = []
    for rank in range(2):
        shard = Shard.split_padded(VOCAB, rank, 2)
        vocabulary = Vocabulary(stored.weights(), shard, VOCAB, is_tied)
        parts.append(vocabulary.head(x))
        ids = torch.tensor([3, 39, 3])
        torch.testing.assert_close(vocabulary.embed(ids), (table if module == "lm_head" else wide)[ids])
    expected = wide if module == "lm_head" or is_tied else head
    torch.testing.assert_close(torch.cat(parts, dim=1), x @ expected.t(), rtol=1e-4, atol=1e-4)
