"""The KV cache of one rank: keys and values of each token, for each paged layer, in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.llm.cache.kv_formats import KvFormat
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
        kv_format: KvFormat | None = None,
    ) -> None:
        """`dtype`: the model's, which keys and values have where there is no format."""
        self.block_size, self.spare_slot = block_size, num_blocks * block_size
        self.dtype, self.device, self.format = dtype, device, kv_format
        num_slots = self.spare_slot + block_size
        # By layer, keys before values: [num_slots, 2 · kv_heads, head_dim].
        # Not zeroed: a slot is written before it is read.
        self.tensors: list[Tensor] = []
        # By layer, of a format: [num_slots, 2 · kv_heads] float32.
        self.scales: list[Tensor] = []
        for layer in layers:
            heads = num_slots, 2 * layer.num_kv_heads
            of_numbers = dtype if kv_format is None else kv_format.dtype
            tensor = torch.empty(*heads, layer.head_dim, dtype=of_numbers, device=device)
            if device.type == "cpu":
                huge_pages.advise(tensor.data_ptr(), tensor.nbytes)
            self.tensors.append(tensor)
            if kv_format is not None:
                self.scales.append(torch.empty(heads, dtype=torch.float32, device=device))

    def read(self, layer: int, slots: slice | Tensor) -> Tensor:
        """Keys before values of these slots, in the model's type: [n, 2 · kv_heads, head_dim]."""
        numbers = _take(self.tensors[layer], slots)
        if self.format is None:
            return numbers
        return self.format.dequantize(numbers, _take(self.scales[layer], slots), self.dtype)

    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Rows as `read` returns them to these slots [n] int64."""
        tensor = self.tensors[layer]
        if self.format is None:
            tensor.index_copy_(0, slots, rows)
            return
        numbers, scales = self.format.quantize(rows)
        # torch copies no rows of float8.
        tensor.view(torch.int8).index_copy_(0, slots, numbers.view(torch.int8))
        self.scales[layer].index_copy_(0, slots, scales)

    def scales_of(self, layer: int) -> Tensor | None:
        return self.scales[layer] if self.scales else None

    def zero(self, layer: int) -> None:
        """For what is read before it is written."""
        for tensors in (self.tensors, self.scales):
            if tensors:
                tensors[layer].zero_()

    @property
    def max_slot_bytes(self) -> int:
        """Of one token in one layer, as it is read."""
        return max(tensor[0].numel() for tensor in self.tensors) * self.dtype.itemsize

    @property
    def max_head_dim(self) -> int:
        """Of any layer."""
        return max(tensor.shape[2] for tensor in self.tensors)

    @property
    def min_kv_heads(self) -> int:
        """Of any layer."""
        return min(tensor.shape[1] // 2 for tensor in self.tensors)


def _take(tensor: Tensor, slots: slice | Tensor) -> Tensor:
    """A view of a slice. torch selects no rows of float8."""
    if isinstance(slots, slice):
        return tensor[slots]
    if tensor.itemsize > 1:
        return tensor.index_select(0, slots)
    return tensor.view(torch.int8).index_select(0, slots).view(tensor.dtype)
