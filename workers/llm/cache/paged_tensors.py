"""The KV cache of one rank: keys and values of each token, for each paged layer, in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.llm.cache.spec import Paged
from workers.nn.native import huge_pages


class PagedTensors:
    """`num_blocks` blocks and a spare one: padding rows of a batch write to its first slot, `spare_slot`."""

    def __init__(
        self,
        layers: Sequence[Paged],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.spare_slot = block_size, num_blocks * block_size
        self.dtype, self.device = dtype, device
        num_slots = self.spare_slot + block_size
        # By layer, keys before values: [num_slots, 2 · kv_heads, head_dim].
        # Not zeroed: a slot is written before it is read.
        self.tensors: list[Tensor] = []
        for layer in layers:
            shape = (num_slots, 2 * layer.num_kv_heads, layer.head_dim)
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if device.type == "cpu":
                huge_pages.advise(tensor.data_ptr(), tensor.nbytes)
            self.tensors.append(tensor)

    @property
    def max_slot_bytes(self) -> int:
        """Of one token in one layer."""
        return max(tensor[0].nbytes for tensor in self.tensors)

    @property
    def max_head_dim(self) -> int:
        """Of any layer."""
        return max(tensor.shape[2] for tensor in self.tensors)

    @property
    def min_kv_heads(self) -> int:
        """Of any layer."""
        return min(tensor.shape[1] // 2 for tensor in self.tensors)
