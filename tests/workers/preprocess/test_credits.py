"""Who may open how much: pure."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import MIB
from pipeline.config.preprocess import MAX_OVERLOAD
from pipeline.wire.errors import RequestError
from workers.preprocess.credits import Credits, Shares


def open_all(credits: Credits, tenant: str, was_begun: bool = False) -> tuple[int, int]:
    """Opens requests until one is refused: how many, and with which status."""
    for number in range(5000):
        try:
            credits.open(tenant, was_begun)
        except RequestError as error:
            return number, error.info.status
    raise AssertionError("there is no end")


def test_one_tenant_has_nearly_all_and_refuses_nobody_else() -> None:
    credits = Credits(512, 1)
    assert open_all(credits, "flood") == (448, 429)
    for number in range(4):
        credits.open(f"other {number}")
    assert open_all(credits, "flood") == (0, 429), "it has far more than its share"


def test_the_more_there_are_the_less_each_has() -> None:
    credits = Credits(512, 1)
    numbers: Counter[str] = Counter()
    statuses: set[int] = set()
    tenants = [f"t{number}" for number in range(7)]
    for _ in range(512):
        for tenant in tenants:
            try:
                credits.open(tenant)
            except RequestError as error:
                statuses.add(error.info.status)
            else:
                numbers[tenant] += 1
    assert set(numbers.values()) <= {71, 72}, "7 / 50 of all"
    assert statuses == {429}
    credits.open("who comes last")


def test_a_full_server_is_nobodys_fault_and_says_so() -> None:
    credits = Credits(8, 1)
    for number in range(8):
        credits.open(f"t{number}")
    with pytest.raises(RequestError, match="overloaded") as caught:
        credits.open("t8")
    assert caught.value.info.status == 503
    credits.close("t0", 0)
    credits.open("t8")


def test_the_smallest_servers_serve_too() -> None:
    assert open_all(Credits(1, 1), "a") == (1, 429)
    assert open_all(Credits(2, 1), "a") == (1, 429)
    assert open_all(Credits(4, 1), "a") == (3, 429)


def test_what_was_begun_goes_on_and_takes_no_place_from_others() -> None:
    credits = Credits(512, 1)
    open_all(credits, "flood")
    num_more, _ = open_all(credits, "flood", was_begun=True)
    assert 0 < num_more < MAX_OVERLOAD * 512
    for number in range(8):
        credits.open(f"other {number}")


def test_media_are_shared_in_the_same_way() -> None:
    credits = Credits(512, 8)
    credits.open("flood")
    credits.hold("flood", 7 * MIB)
    with pytest.raises(RequestError, match="limited to 8 MiB") as caught:
        credits.hold("flood", 1)
    assert caught.value.info.status == 429
    credits.close("flood", 7 * MIB + 1)
    credits.open("alone")
    credits.hold("alone", 8 * MIB)  # or it could never be served
    credits.open("other")
    with pytest.raises(RequestError) as caught:
        credits.hold("other", 1)
    assert caught.value.info.status == 503
    credits.close("other", 1)
    credits.close("alone", 8 * MIB)
    assert credits.num_requests == credits.num_held_bytes == 0


EVENTS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-3, 3)), max_size=200)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), EVENTS)
def test_a_newcomer_is_refused_only_where_nothing_is_free(limit: int, events: list[tuple[str, int]]) -> None:
    shares, held = Shares(limit), Counter[str]()
    for tenant, change in events:
        if change > 0 and shares.fits(tenant, change):
            shares.add(tenant, change)
            held[tenant] += change
        elif change < 0 and held[tenant] >= -change:
            shares.remove(tenant, -change)
            held[tenant] += change
        assert shares.total == held.total() <= limit
        assert shares.fits("newcomer", 1) == (shares.total < limit)
