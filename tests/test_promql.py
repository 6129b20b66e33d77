"""The reader of PromQL finds the mistakes that it is to find."""

from __future__ import annotations

import pytest

from tests.promql import Use, check, uses

KINDS = {"c_total": "counter", "g": "gauge", "h_bucket": "histogram", "h_sum": "histogram"}
LABELS = {"c_total": {"worker"}, "g": {"worker"}, "h_bucket": {"le", "key"}, "h_sum": {"key"}}


def test_uses_are_found_with_what_is_around_them() -> None:
    found = uses(
        'histogram_quantile(0.9, sum by (le, key) (rate(h_bucket{a=~"$b", c="d"}[$__rate_interval])))'
    )
    functions = ("histogram_quantile", "sum", "rate")
    assert found == [Use("h_bucket", ("a", "c"), ("le", "key"), functions, is_range=True)]
    assert [use.name for use in uses('sum (g{x="rate(y)"}) > 0 and up == 1 + 2.5')] == ["g", "up"]


@pytest.mark.parametrize("expression", [
    "sum (rate(c_total[5m])) / scalar(sum by (worker) (rate(h_sum[5m])))".replace("worker", "key"),
    'max by (worker) (g{instance="a"})',
    "histogram_quantile(0.5, sum by (le) (rate(h_bucket[1m])))",
])  # fmt: skip
def test_right_expressions_pass(expression: str) -> None:
    for use in uses(expression):
        check(use, KINDS, LABELS)


@pytest.mark.parametrize(("expression", "why"), [
    ("sum (rate(missing_total[5m]))", "no metric"),
    ("rate(g[5m])", "is a gauge"),
    ("sum (c_total)", "is a counter"),
    ("rate(c_total)", "needs a range"),
    ("histogram_quantile(0.5, rate(h_bucket[1m]))", "need le"),
    ("histogram_quantile(0.5, sum by (le) (rate(h_sum[1m])))", "of buckets"),
    ("sum (rate(h_bucket[1m]))", "of buckets"),
    ("sum by (shoe) (g)", "has only"),
    ('g{shoe="1"}', "has only"),
    ("sum (g", "parenthesis"),
])  # fmt: skip
def test_wrong_expressions_are_found(expression: str, why: str) -> None:
    def check_all() -> None:
        for use in uses(expression):
            check(use, KINDS, LABELS)

    with pytest.raises(AssertionError, match=why):
        check_all()
