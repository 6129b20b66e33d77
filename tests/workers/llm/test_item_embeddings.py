from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.transport.tensors import TensorHandle
from pipeline.wire.steps import EmbeddingSlice
from workers.llm.item_embeddings import PlacedSlice, place_embeddings

HIDDEN = 4


def make_handle(slot: int, rows: int, width: int) -> TensorHandle:
    return TensorHandle("vit.0", 1, slot, 0, 0, (rows, width), "float32")


class Pool:
    """Embeddings by slot."""

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrices = [torch.randn(rows, width, generator=generator) for rows in (6, 3)]

    def slice(self, slot: int, start: int, length: int) -> EmbeddingSlice:
        rows, width = self.matrices[slot].shape
        return EmbeddingSlice(make_handle(slot, rows, width), start, 0, length)

    def gather(self, out: Tensor, embeddings: TensorHandle, start: int) -> None:
        assert out.is_contiguous()
        out.copy_(self.matrices[embeddings.slot][start : start + len(out)])


@pytest.mark.parametrize("num_features", [0, 3])
def test_rows_go_to_their_tokens_and_further_columns_go_with_them(num_features: int) -> None:
    pool = Pool((1 + num_features) * HIDDEN)
    x = torch.zeros(10, HIDDEN)
    slices = [PlacedSlice(1, pool.slice(0, 2, 4)), PlacedSlice(7, pool.slice(1, 0, 3))]
    features = place_embeddings(x, slices, pool.gather, num_features)
    found = torch.cat((pool.matrices[0][2:6], pool.matrices[1]))
    tokens = [1, 2, 3, 4, 7, 8, 9]
    assert torch.equal(x[tokens], found[:, :HIDDEN])
    assert not x[[0, 5, 6]].any(), "text is left alone"
    if not num_features:
        assert features is None
        return
    assert features is not None
    assert features.rows.tolist() == tokens
    assert features.values.shape == (7, num_features, HIDDEN)
    for number in range(num_features):
        columns = slice((1 + number) * HIDDEN, (2 + number) * HIDDEN)
        assert torch.equal(features.values[:, number], found[:, columns])


def test_a_step_of_text_has_no_features() -> None:
    x = torch.ones(2, HIDDEN)
    assert place_embeddings(x, [], Pool(HIDDEN).gather, 3) is None
    assert bool((x == 1).all())
