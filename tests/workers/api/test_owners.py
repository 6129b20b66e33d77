"""Which tenant has asked for a request."""

from __future__ import annotations

from workers.api.owners import KEPT_S, MAX_ENDED, Owners


def test_a_request_has_its_owner_until_a_little_after_its_end() -> None:
    owners = Owners()
    owners.begin(["a"], "key:alice")
    owners.begin(["b-0", "b-1"], "key:bob")
    assert [owners.tenant_of(name) for name in ("a", "b-0", "b-1", "c")] == [
        "key:alice", "key:bob", "key:bob", None,
    ]  # fmt: skip
    owners.end(["a"], 100.0)
    assert owners.tenant_of("a") == "key:alice"
    owners.end(["b-0", "b-1"], 100.5 + KEPT_S)
    assert owners.tenant_of("a") is None
    assert owners.tenant_of("b-1") == "key:bob"


def test_what_has_ended_is_bounded() -> None:
    owners = Owners()
    for number in range(MAX_ENDED + 10):
        owners.begin([str(number)], "key:alice")
        owners.end([str(number)], 100.0)
    assert len(owners) == MAX_ENDED
    assert owners.tenant_of("0") is None
