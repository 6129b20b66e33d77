"""The KV cache's blocks: the block tables of requests, and the published prefixes. Pure, no tensors.

Prefix caching by block hashes, as vLLM and nano-vllm do it: a full block is published under the hash of all
tokens up to its end. Several requests may hold it. A block that no request holds can be found until it is
reused, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # reused from the front
        self._num_users = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._tables: dict[Hashable, list[int]] = {}

    def num_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The published blocks of the longest cached prefix."""
        found: list[int] = []
        for digest in hashes:
            if (block := self._by_hash.get(digest)) is None:
                break
            found.append(block)
        return found

    def can_allocate(self, found: Sequence[int], num_tokens: int, num_spare: int = 0) -> bool:
        """Whether there are blocks for `num_tokens`, the first of them `found`, and `num_spare` more."""
        revived = sum(self._num_users[block] == 0 for block in found)
        return self.num_needed(num_tokens) - len(found) + revived + num_spare <= len(self._free)

    def allocate(self, owner: Hashable, found: Sequence[int], num_tokens: int) -> list[int]:
        """The block table of a new request: the `found` blocks, then free ones up to `num_tokens`.

        `grow` extends the table in place. Raises ValueError if the request has blocks already, or too few are
        free.
        """
        if owner in self._tables or not self.can_allocate(found, num_tokens):
            free = f"{len(self._free)} are free, or it has some already"
            raise ValueError(f"no blocks for {num_tokens} tokens of {owner}: {free}")
        for block in found:
            self._num_users[block] += 1
            self._free.pop(block, None)
        table = self._tables[owner] = list(found)
        self.grow(owner, num_tokens)
        return table

    def grow(self, owner: Hashable, num_tokens: int) -> bool:
        """Extends a request's table to hold `num_tokens`. False, without a change, if too few are free."""
        table = self._tables[owner]
        missing = self.num_needed(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        # Adjacent where possible: attention reads a run of blocks in place.
        for block in sorted(self._free.popitem(last=False)[0] for _ in range(missing)):
            if (digest := self._hashes[block]) is not None:
                del self._by_hash[digest]
                self._hashes[block] = None
            self._num_users[block] = 1
            table.append(block)
        return True

    def publish(self, block: int, digest: bytes) -> None:
        """The block is full and computed. A block that is published under the same hash already stays so."""
        if self._hashes[block] is None and digest not in self._by_hash:
            self._hashes[block] = digest
            self._by_hash[digest] = block

    def free(self, owner: Hashable) -> None:
        """Frees a request's blocks. The last ones are reused first: more prompts share the first ones."""
        for block in reversed(self._tables.pop(owner)):
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    @property
    def num_free(self) -> int:
        """Blocks that no request holds; some of them may be published."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._by_hash)

    def check_integrity(self) -> None:
        users = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table:
                users[block] += 1
        assert users == self._num_users, "a block's users are counted wrong"
        unused = {block for block, count in enumerate(users) if not count}
        assert unused == set(self._free), "blocks are lost or held twice"
        by_hash = {digest: block for block, digest in enumerate(self._hashes) if digest is not None}
        assert by_hash == self._by_hash, "a hash names a wrong block"
