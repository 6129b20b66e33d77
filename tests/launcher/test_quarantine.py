"""Who is in quarantine, and for how long."""

from __future__ import annotations

from launcher.quarantine import MAX_QUARANTINED, QUARANTINE_S, QuarantineRecord
from pipeline.wire.topology import Role


def test_a_request_is_quarantined_in_each_role_that_died_of_it_for_ten_minutes_after_the_last_death() -> None:
    assert QUARANTINE_S == 600.0
    kept = QuarantineRecord()
    kept.add(Role.LLM, (b"poison", b"neighbour"), 100.0)
    kept.add(Role.VIT, (b"poison",), 200.0)
    kept.add(Role.LLM, (b"poison",), 300.0)
    assert kept.quarantined(699.9) == {Role.LLM: (b"neighbour", b"poison"), Role.VIT: (b"poison",)}
    assert kept.quarantined(700.0) == {Role.LLM: (b"poison",), Role.VIT: (b"poison",)}
    assert kept.quarantined(800.0) == {Role.LLM: (b"poison",)}
    assert kept.quarantined(900.0) == {}


def test_the_first_new_token_clears_it_in_all_roles() -> None:
    kept = QuarantineRecord()
    kept.add(Role.PREPROCESS, (b"a",), 0.0)
    kept.add(Role.LLM, (b"a", b"b"), 0.0)
    kept.clear(b"a")
    kept.clear(b"never heard of")
    assert kept.quarantined(1.0) == {Role.LLM: (b"b",)}
    kept.add(Role.LLM, (b"a",), 2.0)
    assert kept.quarantined(3.0) == {Role.LLM: (b"b", b"a")}, "a later death counts again"


def test_beyond_the_limit_the_oldest_leave_first() -> None:
    kept = QuarantineRecord()
    kept.add(Role.LLM, (b"first", b"second"), 0.0)
    kept.add(Role.VIT, (number.to_bytes(8, "little") for number in range(MAX_QUARANTINED - 2)), 1.0)
    assert kept.quarantined(2.0)[Role.LLM] == (b"first", b"second")
    kept.add(Role.LLM, (b"first",), 3.0)
    assert kept.quarantined(3.0)[Role.LLM] == (b"second", b"first"), "it died once more: it is the youngest"
    kept.add(Role.PREPROCESS, (b"third",), 4.0)
    found = kept.quarantined(5.0)
    assert (found[Role.LLM], found[Role.PREPROCESS]) == ((b"first",), (b"third",))
    assert sum(map(len, found.values())) == MAX_QUARANTINED
