"""Which output layer a decoder takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
