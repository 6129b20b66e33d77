"""The dashboard and the alerts against the workers' declarations; `tests/integration/test_metrics.py` holds
them against a real server."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from pipeline.wire.metrics import Metric
from tests.promql import check, uses
from tools.dashboard import DASHBOARD, WIDTH, dashboard, rows, text
from tools.metrics_page import declarations, key_declarations, shown_name
from workers.api.key_metrics import PREFIX as KEY_PREFIX
from workers.api.metrics import PREFIX
from workers.api.vllm_metrics import VLLM_NAMES

ALERTS = Path(__file__).parents[2] / "tools" / "deploy" / "alerts.yml"
EXPRESSIONS = [query.expr for row in rows() for panel in row.panels for query in panel.queries]
OF_ALERTS = re.findall(r"^ *expr: (.+)$", ALERTS.read_text(), re.MULTILINE)


def declared() -> tuple[dict[str, str], dict[str, set[str]]]:
    """Kinds and labels by a sample's name; `up` is Prometheus' own."""
    kinds, labels = {"up": "gauge"}, {"up": set[str]()}
    for prefix, own, metrics in (
        (PREFIX, {"worker"}, itertools.chain(*declarations().values())),
        (KEY_PREFIX, set[str](), key_declarations()),
    ):
        for metric in metrics:
            for name in _samples(prefix, metric):
                kinds[name] = metric.kind
                has_more = prefix == PREFIX and metric.name in VLLM_NAMES
                more = {"model_name", "engine"} if has_more else set[str]()
                labels[name] = {*own, *more, metric.label, "le" if name.endswith("_bucket") else ""} - {""}
    return kinds, labels


def _samples(prefix: str, metric: Metric) -> list[str]:
    name = shown_name(prefix, metric)
    if metric.kind == "histogram":
        return [f"{name}_{part}" for part in ("bucket", "sum", "count")]
    return [name]


def test_the_file_is_up_to_date() -> None:
    assert DASHBOARD.read_text() == text(), "python -m tools.dashboard"


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *OF_ALERTS])
def test_every_query_names_metrics_that_are_declared(expression: str) -> None:
    found = uses(expression)
    assert found
    for use in found:
        check(use, *declared())


def test_the_expressions_of_the_file_are_those_of_the_rows() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert [target["expr"] for panel in panels for target in panel.get("targets", ())] == EXPRESSIONS
    assert len(OF_ALERTS) == ALERTS.read_text().count("- alert:") > 0


def test_panels_do_not_overlap_and_fit_the_grid() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
