from __future__ import annotations

from tools.metrics_page import PAGE, declarations, page
from workers.api.vllm_metrics import VLLM_NAMES


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(declarations()), "python -m tools.metrics_page"


def test_every_name_of_vllm_is_declared() -> None:
    assert {metric.name for metrics in declarations().values() for metric in metrics} >= VLLM_NAMES
