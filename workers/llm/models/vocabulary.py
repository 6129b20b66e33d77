"""The embedding table and the output layer of a decoder, which may be tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.llm.parallel import TensorParallel
from workers.nn.weights.base import Linear
from workers.nn.weights.shard import Shard
from workers.nn.weights.weights import Weights

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head"


class Vocabulary:
    """The table is whole on every rank, the output layer sharded. `table`, `head`: names in the
    checkpoint."""

    def __init__(
        self,
        weights: Weights,
        shard: Shard,
        vocab_size: int,
        is_tied: bool,
        table: str = EMBEDDINGS,
        head: str = HEAD,
    ) -> None:
        self._dtype, self._vocab_size = weights.dtype, vocab_size
        module = table.removesuffix(".weight")
        # On the CPU the table stays in the file: tied weights are in memory already, for the output layer.
        is_in_file = weights.device.type == "cpu" and not weights.is_quantized(module)
        self.table = weights.rows_in_file(table) if is_in_file else weights.matrix(module)
        if weights.has_module(head) and not (is_tied and _are_equal(weights, shard, module, head)):
            self.head = weights.column((head,), (shard,))
        elif weights.is_quantized(module):
            self.head = weights.column((module,), (shard,))
        else:
            self.head = self._tied_head(weights, shard, table, head)

    def _tied_head(self, weights: Weights, shard: Shard, table: str, head: str) -> Linear:
        if not isinstance(self.table, Tensor):
            return weights.tied(head, table, shard)
        (rows,), padding, _ = shard
        part = self.table[rows]  # a view
        return weights.packed(head, F.pad(part, (0, 0, 0, padding)) if padding else part)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[num_tokens, hidden]"""
        return self.table[token_ids].to(self._dtype)

    def logits(self, hidden: Tensor, out: Tensor | None, parallel: TensorParallel) -> Tensor:
        """As `Decoder.logits`."""
        logits = parallel.gather_last(self.head(hidden))[:, : self._vocab_size]
        return logits.float() if out is None else out.copy_(logits)


def _are_equal(weights: Weights, shard: Shard, table: str, head: str) -> bool:
    """Whether a stored output layer is the table. Where it is not, it counts, tied or not: as in
    transformers, for checkpoints whose output layer was trained further. So does a quantised one."""
    if weights.is_quantized(table) or weights.is_quantized(head):
        return False
    return torch.equal(weights.matrix(table, shard), weights.matrix(head, shard))
