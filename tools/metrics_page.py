"""Writes docs/metrics.md: what `/metrics` shows, read off the workers' declarations.

python -m tools.metrics_page         # a test says whether the page is up to date
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.process.metrics import DROPPED_SPANS, Metrics
from pipeline.wire.metrics import Metric
from workers.api import key_metrics
from workers.api.metrics import OF_ALL, PREFIX
from workers.api.vllm_metrics import VLLM_NAMES
from workers.api.worker import COUNTED as API_COUNTED
from workers.api.worker import LANE_MESSAGES
from workers.carrier import metrics as carrier
from workers.gateway import metrics as gateway
from workers.llm import metrics as llm
from workers.llm.request_stats import RequestStats
from workers.llm.step_stats import StepStats
from workers.preprocess import metrics as preprocess
from workers.vit.metrics import VitStats

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
INTRODUCTION = """# Metrics

`GET /metrics` answers in the text format of Prometheus. Written by `tools/metrics_page.py` from the workers'
declarations: change those, not this page.

Where API keys are in use, the route needs one: a client's key shows the metrics by key of its own name, the
admin key shows those of all names. Workers report about once a second.

- `tools/deploy/prometheus.yml` scrapes the server, `tools/deploy/alerts.yml` has alerts, and
  `tools/deploy/grafana.json` is a dashboard: import it into Grafana and choose the data source.
- Every metric of a worker has the label `worker`, as `llm.0` or `vit.1`. A worker that was replaced counts
  from zero again, as Prometheus' functions (`rate`, `increase`) expect.
- Of a request with several choices (`n`) each choice is measured.
- Times are measured where the work is done, by the monotonic clock. A request's time begins when preprocess
  takes in its first attempt, so a worker's death lengthens it.

## vLLM's names

Metrics marked with • have vLLM's name behind the prefix `vlm_`, vLLM's meaning and bounds, and its labels
`model_name` and `engine` (the number of the group with `--dp`). With `--vllm-metric-names` these metrics are
also shown exactly as vLLM shows them, as `vllm:time_to_first_token_seconds`, without the label `worker` and
summed over workers: dashboards and autoscalers for vLLM then work as they are. A sum keeps what a replaced
worker has counted. What differs:

- `mm_cache_queries` and `mm_cache_hits` count chunks at the ViT. A picture is one chunk, a video several. A
  picture that the prefix cache covers asks the ViT all the same.
- `request_queue_time_seconds` and `request_prefill_time_seconds` are measured when the request leaves the
  queue or gets its first token, in vLLM when the request has ended.
- `num_requests_waiting` is without the requests that preprocess is still preparing; those are in
  `vlm_open_requests` of `preprocess.0`.

## The stages of a request with a picture

| stage | metric | worker |
| --- | --- | --- |
| fetch | `vlm_stage_fetch_seconds` | preprocess |
| decode | `vlm_stage_media_decode_seconds` | preprocess |
| wait for the ViT | `vlm_stage_vit_wait_seconds` | vit |
| ViT | `vlm_stage_vit_seconds` | vit |
| hand-off | `vlm_stage_hand_off_seconds` | llm |
| queue | `vlm_request_queue_time_seconds` | llm |
| prefill | `vlm_request_prefill_time_seconds` | llm |
| decode | `vlm_request_decode_time_seconds` | llm |

A request's stages overlap: it waits in the queue while its picture is encoded, and its prefill begins before
the embeddings are there. A hand-off takes until rank 0 reads its messages, between two steps.
"""


class _Anything:
    """Stands for what the declarations would read: only their names and texts are of interest."""

    def __getattr__(self, name: str) -> _Anything:
        return self


def declarations() -> dict[str, tuple[Metric, ...]]:
    """All metrics, by the kind of worker; without their prefix."""
    anything: Any = _Anything()
    of_llm, of_vit, of_preprocess, of_gateway, of_carrier, of_api, of_any = (Metrics() for _ in range(7))
    RequestStats(of_llm, 1, time.monotonic)
    StepStats(of_llm)
    llm.declare(of_llm, anything, anything)
    VitStats(of_vit, anything, anything)
    preprocess.declare(of_preprocess, anything, anything, lambda: 0)
    gateway.declare(of_gateway, anything, dict)
    carrier.declare(of_carrier, anything, ())
    of_api.counters(API_COUNTED, dict)
    of_api.counter("lane_messages", LANE_MESSAGES, lambda: 0)
    of_any.counter("dropped_spans", DROPPED_SPANS, lambda: 0)
    return {
        "every worker": (*OF_ALL, *of_any.declared),
        "llm: rank 0 of each group": of_llm.declared,
        "vit": of_vit.declared,
        "preprocess": of_preprocess.declared,
        "api": of_api.declared,
        "gateway: with --direct-port": of_gateway.declared,
        "carrier: on several nodes": of_carrier.declared,
    }


def key_declarations() -> list[Metric]:
    """Of API keys, without their prefix."""
    counted = [Metric(name, "counter", text, label="key") for name, text in key_metrics.COUNTED.items()]
    return counted + [
        Metric(name, "histogram", text, label="key") for name, text in key_metrics.MEASURED.items()
    ]


def shown_name(prefix: str, metric: Metric) -> str:
    """As queries name it."""
    return f"{prefix}{metric.name}{'_total' if metric.kind == 'counter' else ''}"


def page(declared: Mapping[str, Iterable[Metric]]) -> str:
    parts = [INTRODUCTION]
    for title, metrics in declared.items():
        parts.append(f"## {title}\n\n{_table(PREFIX, metrics)}")
    keys = "Only where API keys are in use. Requests without a valid key count under the empty name."
    parts.append(f"## By API key\n\n{keys}\n\n{_table(key_metrics.PREFIX, key_declarations())}")
    return "\n".join(parts)


def _table(prefix: str, metrics: Iterable[Metric]) -> str:
    rows = ["| metric | | type | label | what |", "| --- | --- | --- | --- | --- |"]
    for metric in sorted(metrics, key=lambda metric: metric.name):
        mark = "•" if prefix == PREFIX and metric.name in VLLM_NAMES else ""
        label = f"`{metric.label}`" if metric.label else ""
        rows.append(f"| `{shown_name(prefix, metric)}` | {mark} | {metric.kind} | {label} | {metric.text} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(declarations()))
