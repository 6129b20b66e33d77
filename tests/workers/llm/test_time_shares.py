"""Whose tokens go into a step."""

from __future__ import annotations

from collections import Counter

from workers.llm.time_shares import TimeShares


def per_token(num_tokens: int) -> float:
    """As on a CPU: each token costs as much as the rest of the step."""
    return 1.0 + num_tokens


def flat(num_tokens: int) -> float:
    """As on a GPU."""
    return 10.0 + 0.01 * num_tokens


def run(
    shares: TimeShares, num_tokens: dict[str, int], seconds_of: object, steps: int
) -> tuple[Counter[str], float]:
    """Steps that each tenant was in, and the seconds that all took."""
    took, total = Counter[str](), 0.0
    for _ in range(steps):
        chosen = shares.choose(num_tokens, seconds_of)  # type: ignore[arg-type]
        counts = Counter({tenant: num_tokens[tenant] for tenant in chosen})
        seconds = seconds_of(counts.total())  # type: ignore[operator]
        shares.charge(counts, seconds)
        took.update(chosen)
        total += seconds
    return took, total


def test_a_tenant_of_one_stream_gets_half_of_the_time_beside_one_of_many() -> None:
    took, total = run(TimeShares(), {"one": 1, "many": 63}, per_token, 1000)
    seconds_of_one = 2.0 * (took["one"] - took["many"]) + took["many"]
    assert 0.4 < seconds_of_one / total < 0.6
    assert took["many"] > 20, "and many goes on"
    assert total / took["one"] < 3 * per_token(1) * 1.4, "its stream is hardly three times as slow as alone"


def test_where_streams_cost_nothing_beside_each_other_all_go_together() -> None:
    took, _ = run(TimeShares(), {"one": 1, "many": 63}, flat, 100)
    assert took == {"one": 100, "many": 100}


def test_equals_go_together() -> None:
    took, _ = run(TimeShares(), {"a": 8, "b": 8, "c": 8}, per_token, 90)
    assert took == {"a": 90, "b": 90, "c": 90}


def test_two_of_one_stream_go_together_before_one_of_many() -> None:
    shares = TimeShares()
    run(shares, {"a": 1, "b": 1, "many": 62}, per_token, 1)
    assert shares.choose({"a": 1, "b": 1, "many": 62}, per_token) == {"a", "b"}


def test_who_comes_has_no_claim_to_the_time_before() -> None:
    shares = TimeShares()
    run(shares, {"many": 63}, per_token, 1000)
    took, _ = run(shares, {"many": 63, "one": 1}, per_token, 100)
    assert took["many"] >= 2


def test_a_tenant_alone_has_every_step() -> None:
    took, _ = run(TimeShares(), {"many": 63}, per_token, 10)
    assert took == {"many": 10}
