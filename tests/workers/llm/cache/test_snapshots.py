from __future__ import annotations

import pytest

from workers.llm.cache.snapshots import Snapshots


def saved(snapshots: Snapshots, digest: bytes, is_frame: bool = False) -> int:
    place = snapshots.reserve()
    assert place is not None
    snapshots.publish(place, digest, is_frame)
    return place


def test_the_least_recently_used_makes_room() -> None:
    snapshots = Snapshots(2)
    first = saved(snapshots, b"a")
    saved(snapshots, b"b")
    assert snapshots.use(b"a") == first
    saved(snapshots, b"c")
    assert b"a" in snapshots
    assert b"b" not in snapshots
    snapshots.check_integrity()
    snapshots.check_idle()


def test_frames_make_room_first_however_new_they_are() -> None:
    snapshots = Snapshots(2)
    saved(snapshots, b"old")
    saved(snapshots, b"frame", is_frame=True)
    saved(snapshots, b"new")
    assert b"old" in snapshots
    assert b"frame" not in snapshots


def test_a_reserved_place_is_nobodys() -> None:
    snapshots = Snapshots(1)
    place = snapshots.reserve()
    assert place is not None
    assert snapshots.num_free == 0
    assert snapshots.reserve() is None
    with pytest.raises(AssertionError, match="reserved"):
        snapshots.check_idle()
    snapshots.release(place)
    assert snapshots.reserve() == place


def test_a_prefix_has_one_place() -> None:
    snapshots = Snapshots(3)
    first = saved(snapshots, b"a")
    place = snapshots.reserve()
    assert place is not None
    assert not snapshots.publish(place, b"a", is_frame=True)
    assert (len(snapshots), snapshots.use(b"a")) == (1, first)
    snapshots.check_integrity()
    snapshots.forget(b"a")
    snapshots.forget(b"a")
    assert len(snapshots) == 0
    snapshots.check_integrity()


def test_the_longest_boundary_is_the_last_one_with_a_snapshot() -> None:
    snapshots = Snapshots(3)
    saved(snapshots, b"2")
    saved(snapshots, b"3", is_frame=True)
    saved(snapshots, b"9")
    hashes = [b"1", b"2", b"3", b"4"]
    assert snapshots.longest_boundary(hashes) == 3
    assert snapshots.longest_boundary(hashes[:2]) == 2
    assert snapshots.longest_boundary(hashes[:1]) == 0
