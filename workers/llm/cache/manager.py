"""The cache as the scheduler sees it: the blocks, slots and prefixes of running sequences. Pure.

A cached prefix can be reused up to the longest boundary at which every layer can resume: paged layers need
their blocks, layers with a state need a snapshot of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from workers.llm.cache.blocks import BlockManager
from workers.llm.cache.snapshots import Snapshots
from workers.llm.cache.states import StateSlots


class Allocation(NamedTuple):
    slot: int
    block_table: list[int]  # `extend` extends it in place


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
        num_snapshots: int = 0,
    ) -> CacheManager:
        snapshots = Snapshots(num_snapshots) if num_snapshots else None
        return cls(BlockManager(num_blocks, block_size), StateSlots(num_slots, has_states, snapshots))

    @property
    def block_size(self) -> int:
        return self.blocks.block_size

    @property
    def capacity(self) -> int:
        """The number of tokens in all blocks."""
        return self.blocks.num_blocks * self.blocks.block_size

    @property
    def snapshots(self) -> Snapshots | None:
        """None: no layer keeps a state, or no states of prefixes are kept."""
        return self.slots.snapshots

    @property
    def has_prefixes(self) -> bool:
        """Whether to publish blocks: with states and no snapshots no prefix is ever reused."""
        return self.slots.can_resume

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix at which every layer can resume."""
        if not self.has_prefixes:
            return []
        found = self.blocks.find(hashes)
        return found[: self.slots.longest_boundary(hashes[: len(found)])]

    def has_room(self, found: Sequence[int], num_tokens: int, num_spare: int = 0) -> bool:
        """Whether there are blocks for `num_tokens`, the first of them `found`, and `num_spare` more."""
        return self.blocks.can_allocate(found, num_tokens, num_spare)

    def allocate(self, owner: Hashable, found: Sequence[int], num_tokens: int) -> Allocation:
        """Raises ValueError if the request has a slot or blocks already, or too few are free."""
        slot = self.slots.allocate(owner)
        try:
            return Allocation(slot, self.blocks.allocate(owner, found, num_tokens))
        except ValueError:
            self.slots.free(owner)
            raise

    def extend(self, owner: Hashable, num_tokens: int) -> bool:
        """Extends the block table to hold `num_tokens`. False, without a change, if too few are free."""
        return self.blocks.grow(owner, num_tokens)

    def publish(self, block: int, digest: bytes) -> None:
        self.blocks.publish(block, digest)

    def free(self, owner: Hashable) -> None:
        self.blocks.free(owner)
        self.slots.free(owner)

    def check_integrity(self) -> None:
        self.blocks.check_integrity()
        self.slots.check_integrity()
        if self.snapshots is not None:
            self.snapshots.check_integrity()

    def check_empty(self) -> None:
        """No request runs: no block and no slot may be held."""
        assert self.blocks.num_free == self.blocks.num_blocks, "blocks are held by no request"
        assert self.slots.num_free == self.slots.num_slots, "slots are held by no request"
        if self.snapshots is not None:
            self.snapshots.check_idle()
