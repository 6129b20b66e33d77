from __future__ import annotations

import pytest

from workers.llm.cache.blocks import BlockManager


def test_blocks_are_never_given_twice() -> None:
    blocks = BlockManager(4, 4)
    assert sorted([*blocks.allocate("a", [], 9), *blocks.allocate("b", [], 3)]) == [0, 1, 2, 3]
    assert not blocks.can_allocate([], 1)
    with pytest.raises(ValueError, match="no blocks"):
        blocks.allocate("c", [], 1)
    assert not blocks.grow("b", 5)
    blocks.free("a")
    with pytest.raises(ValueError, match="no blocks"):
        blocks.allocate("b", [], 1)
    assert blocks.grow("b", 16)
    blocks.check_integrity()


def test_a_published_block_is_shared_and_outlives_its_users() -> None:
    blocks = BlockManager(4, 4)
    (first, second) = blocks.allocate("a", [], 8)
    blocks.publish(first, b"1")
    blocks.publish(second, b"2")
    assert blocks.find([b"1", b"2", b"3"]) == [first, second]
    assert blocks.find([b"x", b"2"]) == [], "a prefix begins at the beginning"
    assert blocks.allocate("b", blocks.find([b"1", b"2"]), 12)[:2] == [first, second]
    blocks.free("a")
    blocks.check_integrity()
    assert blocks.num_free == 1
    blocks.free("b")
    assert (blocks.num_free, blocks.num_cached) == (4, 2)
    assert blocks.find([b"1", b"2"]) == [first, second]


def test_the_least_recently_used_go_first_and_ends_before_beginnings() -> None:
    blocks = BlockManager(4, 4)
    for name in "ab":
        for block, digest in zip(
            blocks.allocate(name, [], 8),
            (f"{name}1".encode(), f"{name}2".encode()),
            strict=True,
        ):
            blocks.publish(block, digest)
    blocks.free("a")
    blocks.free("b")
    blocks.allocate("c", [], 4)
    assert len(blocks.find([b"a1", b"a2"])) == 1
    blocks.free("c")
    blocks.allocate("d", [], 4)
    assert len(blocks.find([b"a1"])) == 1, "free blocks without content go first"
    blocks.allocate("e", [], 8)
    assert blocks.find([b"a1"]) == []
    assert len(blocks.find([b"b1", b"b2"])) == 1
    blocks.check_integrity()


def test_equal_content_is_published_once() -> None:
    blocks = BlockManager(4, 4)
    (first,), (second,) = blocks.allocate("a", [], 4), blocks.allocate("b", [], 4)
    blocks.publish(first, b"1")
    blocks.publish(second, b"1")
    assert blocks.find([b"1"]) == [first]
    blocks.free("b")
    blocks.check_integrity()
    assert blocks.find([b"1"]) == [first]


def test_a_found_block_that_is_free_counts_as_taken() -> None:
    blocks = BlockManager(3, 4)
    (block,) = blocks.allocate("a", [], 4)
    blocks.publish(block, b"1")
    blocks.free("a")
    found = blocks.find([b"1"])
    assert blocks.can_allocate(found, 12)
    assert not blocks.can_allocate(found, 12, num_spare=1)
    assert not blocks.can_allocate(found, 16)


def test_the_blocks_of_a_used_cache_lie_side_by_side_again() -> None:
    blocks = BlockManager(100, 4)
    for name in "ab":
        for number, block in enumerate(blocks.allocate(name, [], 200)):
            blocks.publish(block, f"{name}{number}".encode())
    for name in "ab":
        blocks.free(name)
    assert blocks.allocate("c", [], 200) == list(range(50)), "attention reads one run in place"
    blocks.check_integrity()
