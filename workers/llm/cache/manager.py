"""All that running sequences keep between steps, as the scheduler sees it: blocks, slots, prefixes. Pure.

A prefix can be used up to the longest boundary at which every kind of layer has what it needs: paged layers
their blocks, layers with a state a copy of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from workers.llm.cache.blocks import BlockManager
from workers.llm.cache.states import StateSlots


class Allocation(NamedTuple):
    slot: int
    block_table: list[int]  # it grows in place with `extend`


class CacheManager:
    def __init__(self, blocks: BlockManager, slots: StateSlots) -> None:
        self.blocks, self.slots = blocks, slots

    @classmethod
    def of_size(
        cls,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        has_states: bool = False,
    ) -> CacheManager:
        return cls(BlockManager(num_blocks, block_size), StateSlots(num_slots, has_states))

    @property
    def block_size(self) -> int:
        return self.blocks.block_size

    @property
    def capacity(self) -> int:
        """Tokens that fit when one sequence has the cache for itself."""
        return self.blocks.num_blocks * self.blocks.block_size

    @property
    def has_prefixes(self) -> bool:
        """Whether it pays to publish blocks: with states that nobody keeps no prefix is ever found."""
        return self.slots.can_resume

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix that every layer can go on from."""
        if not self.has_prefixes:
            return []
        found = self.blocks.find(hashes)
        return found[: self.slots.longest_boundary(hashes[: len(found)])]

    def has_room(self, found: Sequence[int], num_tokens: int, num_spare: int = 0) -> bool:
        """Whether there are blocks for `num_tokens`, the first of them `found`, and `num_spare` more."""
        return self.blocks.can_allocate(found, num_tokens, num_spare)

    def allocate(self, owner: Hashable, found: Sequence[int], num_tokens: int) -> Allocation:
        """Raises ValueError if the request has something already, or there is too little."""
        slot = self.slots.allocate(owner)
        try:
            return Allocation(slot, self.blocks.allocate(owner, found, num_tokens))
        except ValueError:
            self.slots.free(owner)
            raise

    def extend(self, owner: Hashable, num_tokens: int) -> bool:
        """Lengthens the block table to hold `num_tokens`; False, and nothing done, if too few are free."""
        return self.blocks.grow(owner, num_tokens)

    def publish(self, block: int, digest: bytes) -> None:
        self.blocks.publish(block, digest)

    def free(self, owner: Hashable) -> None:
        self.blocks.free(owner)
        self.slots.free(owner)

    def check_integrity(self) -> None:
        self.blocks.check_integrity()
        self.slots.check_integrity()

    def check_empty(self) -> None:
        """Nobody runs: nothing may be held."""
        assert self.blocks.num_free == self.blocks.num_blocks, "blocks are held for nobody"
        assert self.slots.num_free == self.slots.num_slots, "slots are held for nobody"
