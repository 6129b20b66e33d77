"""The KV cache's blocks: who holds which. Pure bookkeeping, no tensors."""

from __future__ import annotations


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[str, list[int]] = {}

    def num_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        return self.num_needed(num_tokens) <= len(self._free)

    def allocate(self, request_id: str, num_tokens: int) -> list[int]:
        """Blocks for all of a request's tokens. Raises ValueError if it has some already or there are too few."""
        needed = self.num_needed(num_tokens)
        if request_id in self._tables or needed > len(self._free):
            raise ValueError(f"cannot give {needed} blocks to {request_id}: {len(self._free)} are free, or it has some already")
        table = self._tables[request_id] = [self._free.pop() for _ in range(needed)]
        return table

    def free(self, request_id: str) -> None:
        self._free.extend(reversed(self._tables.pop(request_id)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def check_integrity(self) -> None:
        held = [block for table in self._tables.values() for block in table]
        assert sorted([*held, *self._free]) == list(range(self.num_blocks)), "blocks are lost or held twice"
