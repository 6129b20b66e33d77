from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.transport.slots import ALIGNMENT, OrderedSlots, Slot, SlotAllocator
from pipeline.wire.base import Order

UNIT = ALIGNMENT


def test_slots_do_not_overlap_and_come_back() -> None:
    made = SlotAllocator(10 * UNIT, 2 * UNIT, 16)
    slots = [made.allocate(2 * UNIT) for _ in range(4)]
    assert made.allocate(1) is None, "the rest is the reserve"
    assert made.allocate(2 * UNIT, use_reserve=True) is not None
    assert made.allocate(1, use_reserve=True) is None
    made.check_integrity()
    assert slots[1] is not None
    assert slots[2] is not None
    made.free(slots[1])
    made.free(slots[2])
    made.check_integrity()
    assert made.allocate(2 * UNIT) is not None


def test_each_use_of_a_slot_has_its_own_generation() -> None:
    made = SlotAllocator(4 * UNIT, UNIT, 1)
    first = made.allocate(5)
    assert first is not None
    made.free(first)
    second = made.allocate(5)
    assert second is not None
    assert (second.number, second.generation) == (first.number, first.generation + 1)
    with pytest.raises(ValueError, match="not in use"):
        made.free(first)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    made = SlotAllocator(10 * UNIT, 2 * UNIT, 4)
    with pytest.raises(
        ValueError, match=f"{3 * UNIT} bytes is larger than the pool's largest item, {2 * UNIT}"
    ):
        made.allocate(3 * UNIT)
    with pytest.raises(ValueError, match="too small"):
        SlotAllocator(3 * UNIT, 2 * UNIT, 4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.integers(1, 3 * UNIT), st.booleans()), st.integers(0, 20)), max_size=60)
)
def test_no_byte_is_lost_whatever_is_taken_and_given(actions: list[tuple[int, bool] | int]) -> None:
    made = SlotAllocator(20 * UNIT, 3 * UNIT, 8)
    held: list[Slot] = []
    for action in actions:
        if isinstance(action, int):
            if held:
                made.free(held.pop(action % len(held)))
        elif (slot := made.allocate(*action)) is not None:
            held.append(slot)
        made.check_integrity()
        assert made.num_used == len(held)


def ordered(units: int, reserve: int = 1) -> OrderedSlots[str]:
    return OrderedSlots(SlotAllocator(units * UNIT, reserve * UNIT, 64))


def expect(made: OrderedSlots[str], *names: str, tenant: str = "") -> None:
    """Names like "a0": request and position."""
    for name in names:
        made.expect(name, Order(ord(name[0]), int(name[1:])), tenant)


def test_grants_are_in_order_whatever_order_the_requests_come_in() -> None:
    made = ordered(4)
    expect(made, "a0", "a1", "b0")
    for name in ("b0", "a1", "a0"):
        made.request(name, UNIT)
    assert [name for name, _ in made.grant()] == ["a0", "a1", "b0"]


def test_the_reserve_is_kept_for_the_oldest_even_before_it_asks() -> None:
    made = ordered(3)
    expect(made, "a0", "a1", "a2", "a3")
    for name in ("a3", "a2", "a1"):
        made.request(name, UNIT)
    assert [name for name, _ in made.grant()] == ["a1", "a2"]
    assert made.grant() == []
    made.request("a0", UNIT)
    assert [name for name, _ in made.grant()] == ["a0"], "though a1 and a2 fill all the rest"


def test_a_key_that_is_known_late_uses_the_reserve_only_when_it_may() -> None:
    allocator = SlotAllocator(2 * ALIGNMENT, ALIGNMENT, 8)
    slots: OrderedSlots[str] = OrderedSlots(allocator)
    for number, name in enumerate("abc"):
        slots.expect(name, Order(number, 0), may_use_reserve=False)
        slots.request(name, 1)
    assert [name for name, _ in slots.grant()] == ["a"]
    slots.let_use_reserve("c")
    slots.let_use_reserve("c")
    ((name, slot),) = slots.grant()
    assert (name, allocator.is_reserved(slot)) == ("c", True), "another says who is the oldest"
    allocator.free(slot)
    assert slots.grant() == []
    slots.forget("b")
    assert slots.grant() == []


def test_a_tenant_with_a_long_queue_holds_up_its_own_keys_only() -> None:
    made = ordered(5)
    queue = [f"a{number}" for number in range(20)]
    expect(made, *queue, tenant="many")
    for name in queue:
        made.request(name, UNIT)
    held = dict(made.grant())
    assert list(held) == queue[:5]
    expect(made, "b0", tenant="one")
    made.request("b0", UNIT)
    made.allocator.free(held["a2"])
    assert [name for name, _ in made.grant()] == ["b0"], "before, it waited for 15 others"


def test_the_oldest_has_the_reserve_whatever_its_tenant_holds() -> None:
    made = ordered(4)
    expect(made, "a0", "a1", "a2", tenant="many")
    made.request("a1", UNIT)
    made.request("a2", UNIT)
    assert [name for name, _ in made.grant()] == ["a1", "a2"]
    expect(made, "b0", "b1", tenant="one")
    for name in ("b0", "b1", "a0"):
        made.request(name, UNIT)
    assert [name for name, _ in made.grant()] == ["b0", "a0"], "the last of the rest, and the reserve"
    assert made.allocator.check_integrity() is None
    assert made.allocator.held == {"many": 3 * UNIT, "one": UNIT}


def test_a_large_item_of_a_tenant_that_holds_little_is_waited_for() -> None:
    """Else small ones of others would take each byte that comes free before enough are free side by side."""
    made = ordered(6, reserve=3)
    expect(made, "a0", "a1", "a2", "a3", "a4", tenant="many")
    for name in ("a1", "a2", "a3"):
        made.request(name, UNIT)
    held = dict(made.grant())
    expect(made, "b0", tenant="one")
    made.request("b0", 3 * UNIT)
    made.request("a4", UNIT)
    for name in ("a1", "a2"):
        made.allocator.free(held[name])
        assert made.grant() == []
    made.allocator.free(held["a3"])
    assert [name for name, _ in made.grant()] == ["b0"]


def test_a_forgotten_key_makes_way_for_the_next() -> None:
    made = ordered(2)
    expect(made, "a0", "a1", "a2")
    made.request("a1", UNIT)
    made.request("a2", UNIT)
    assert [name for name, _ in made.grant()] == ["a1"]
    made.forget("a0")
    made.forget("a0")
    assert [name for name, _ in made.grant()] == ["a2"], "a2 is the oldest now and may use the reserve"


def test_eviction_makes_room() -> None:
    allocator = SlotAllocator(3 * UNIT, UNIT, 8)
    cached = [allocator.allocate(UNIT), allocator.allocate(UNIT)]

    def evict() -> bool:
        if not cached:
            return False
        slot = cached.pop()
        assert slot is not None
        allocator.free(slot)
        return True

    made: OrderedSlots[str] = OrderedSlots(allocator, evict)
    expect(made, "a0", "a1")
    made.request("a1", UNIT)
    assert [name for name, _ in made.grant()] == ["a1"]
    assert len(cached) == 1, "no more is evicted than is needed"


def test_a_slot_must_be_expected_first() -> None:
    with pytest.raises(ValueError, match="not expected"):
        ordered(2).request("a0", UNIT)
