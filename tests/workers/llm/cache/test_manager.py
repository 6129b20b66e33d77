"""What running sequences keep: blocks and slots together, and how far a prefix can be used."""

from __future__ import annotations

import pytest

from workers.llm.cache.blocks import BlockManager
from workers.llm.cache.manager import CacheManager
from workers.llm.cache.snapshots import Snapshots
from workers.llm.cache.states import StateSlots

HASHES = [b"1", b"2", b"3", b"4"]


def kept_states(*digests: bytes) -> Snapshots:
    """A state is kept behind these blocks."""
    snapshots = Snapshots(8)
    for digest in digests:
        place = snapshots.reserve()
        assert place is not None
        snapshots.publish(place, digest, is_frame=False)
    return snapshots


def filled(slots: StateSlots) -> CacheManager:
    """The first three blocks of HASHES are published."""
    cache = CacheManager(BlockManager(8, 4), slots)
    _, table = cache.allocate("first", [], 12)
    for block, digest in zip(table, HASHES, strict=False):
        cache.publish(block, digest)
    cache.free("first")
    return cache


def test_a_sequence_has_a_slot_and_blocks_or_neither() -> None:
    cache = CacheManager.of_size(4, 4, 2)
    assert cache.allocate("a", [], 9) == (0, [0, 1, 2])
    with pytest.raises(ValueError, match="no blocks"):
        cache.allocate("b", [], 9)
    assert cache.slots.num_free == 1, "the slot has come back"
    assert cache.allocate("b", [], 4).slot == 1
    with pytest.raises(ValueError, match="no slot"):
        cache.allocate("c", [], 0)
    assert not cache.extend("b", 5)
    cache.free("a")
    assert cache.extend("b", 5)
    cache.check_integrity()
    cache.free("b")
    cache.check_empty()


def test_paged_layers_alone_use_every_block_that_is_found() -> None:
    cache = filled(StateSlots(2, has_states=False))
    assert cache.has_prefixes
    assert len(cache.find(HASHES)) == 3


def test_without_snapshots_a_layer_with_a_state_leaves_no_prefix() -> None:
    cache = filled(StateSlots(2, has_states=True))
    assert not cache.has_prefixes
    assert cache.find(HASHES) == []


@pytest.mark.parametrize(
    ("kept", "usable"),
    [((), 0), ((b"1",), 1), ((b"1", b"2"), 2), ((b"2", b"4"), 2), ((b"4",), 0)],
)
def test_a_prefix_is_used_up_to_the_last_boundary_that_every_layer_has(
    kept: tuple[bytes, ...],
    usable: int,
) -> None:
    cache = filled(StateSlots(2, has_states=True, snapshots=kept_states(*kept)))
    assert cache.has_prefixes
    # A state behind a block that is gone is of no use.
    assert cache.find(HASHES) == cache.blocks.find(HASHES)[:usable]
