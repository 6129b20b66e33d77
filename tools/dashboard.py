"""Writes tools/deploy/grafana.json, the dashboard of `/metrics`.

python -m tools.dashboard            # a test says whether the file is up to date

A row of the dashboard is a `Row`; its panels are placed from left to right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "deploy" / "grafana.json"
WIDTH, HEIGHT = 24, 8  # of Grafana's grid, and of a panel
STAT_HEIGHT = 4
OF = '{instance=~"$instance"}'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
STAGES = (
    ("fetch", "stage_fetch_seconds"),
    ("decode picture", "stage_media_decode_seconds"),
    ("wait for ViT", "stage_vit_wait_seconds"),
    ("ViT batch", "stage_vit_seconds"),
    ("hand-off", "stage_hand_off_seconds"),
    ("queue", "request_queue_time_seconds"),
    ("prefill", "request_prefill_time_seconds"),
)


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    text: str  # what it shows, and what to look for
    queries: Sequence[Query]
    unit: str = "short"
    is_stat: bool = False
    is_stacked: bool = False
    most: float | None = None  # of the axis


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


def rate(metric: str, by: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate(vlm_{metric}{OF}[$__rate_interval]))"


def total(gauge: str, by: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (vlm_{gauge}{OF})"


def quantile(share: float, histogram: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels)})"


def mean(histogram: str) -> str:
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def ratio(part: str, whole: str) -> str:
    return f"{rate(part)} / {rate(whole)}"


def quantiles(histogram: str) -> list[Query]:
    return [
        *(Query(quantile(share, histogram), f"P{100 * share:g}") for share in (0.99, 0.95, 0.5)),
        Query(mean(histogram), "mean"),
    ]


def latency(title: str, histogram: str, text: str) -> Panel:
    return Panel(title=title, text=text, queries=quantiles(histogram), unit="s")


def stat(title: str, text: str, expr: str, unit: str = "short") -> Panel:
    return Panel(title=title, text=text, queries=[Query(expr, title)], unit=unit, is_stat=True)


def rows() -> list[Row]:
    return [
        Row("Now", _now()),
        Row("Latency", _latency()),
        Row("Throughput", _throughput()),
        Row("Stages", _stages()),
        Row("Pools and caches", _pools()),
        Row("Recovery", _recovery()),
        Row("Guesses of the next tokens (--speculative)", _guesses()),
        Row("By API key", _keys()),
    ]


def _now() -> list[Panel]:
    return [
        stat("Workers ready", "Of all workers.", total("worker_ready")),
        stat("Running", "Requests in the steps.", total("num_requests_running")),
        stat("Waiting", "Requests that wait for a slot.", total("num_requests_waiting")),
        stat("Tokens/s", "Yielded.", rate("generation_tokens_total")),
        stat("TTFT P95", "Of all requests.", quantile(0.95, "time_to_first_token_seconds"), "s"),
        stat("ITL P99", "Of all streams.", quantile(0.99, "inter_token_latency_seconds"), "s"),
        stat("KV cache", "Share that requests hold.", f"max (vlm_kv_cache_usage_perc{OF})", "percentunit"),
        stat("Restarts, 1 h", "Workers replaced.", f"sum (increase(vlm_worker_restarts_total{OF}[1h]))"),
    ]


def _latency() -> list[Panel]:
    return [
        latency(
            "Time to first token", "time_to_first_token_seconds",
            "From the arrival in preprocess. Grows with pictures to encode and with the queue.",
        ),
        latency(
            "Inter-token latency", "inter_token_latency_seconds",
            "Between two steps that gave a stream tokens. Pictures that arrive must not raise it.",
        ),
        latency("End to end", "e2e_request_latency_seconds", "From the arrival to the last token."),
        latency("Queue", "request_queue_time_seconds", "In rank 0, until the first step takes the request."),
    ]  # fmt: skip


def _throughput() -> list[Panel]:
    return [
        Panel(
            title="Tokens", text="Prompts that were accepted, and tokens yielded.", unit="short",
            queries=[
                Query(rate("prompt_tokens_total"), "prompt tokens/s"),
                Query(rate("generation_tokens_total"), "generated tokens/s"),
            ],
        ),
        Panel(
            title="Finished requests", text="By the reason.", unit="reqps", is_stacked=True,
            queries=[Query(rate("request_success_total", "finished_reason"), "{{finished_reason}}")],
        ),
        Panel(
            title="Requests", text="Waiting for long means: too few slots or blocks.", is_stacked=True,
            queries=[
                Query(total("num_requests_running"), "running"),
                Query(total("num_requests_waiting"), "waiting"),
                Query('sum (vlm_open_requests{instance=~"$instance", worker=~"preprocess.*"})', "open"),
            ],
        ),
        Panel(
            title="Steps", text="Of rank 0. A step is one forward of the language model.", unit="s",
            queries=[*quantiles("step_seconds")],
        ),
        Panel(
            title="Tokens a step", text="Of prompts and decodes.",
            queries=[Query(mean("iteration_tokens_total"), "mean")],
        ),
        Panel(
            title="Pictures", text="Decoded, and encoded; a chunk of a video counts as a picture.",
            queries=[
                Query(rate("decoded_pictures_total"), "decoded/s"), Query(rate("encodes_total"), "encoded/s"),
            ],
        ),
    ]  # fmt: skip


def _stages() -> list[Panel]:
    return [
        Panel(
            title="Where the time goes", unit="s", is_stacked=True,
            text="Mean time of one piece of work in each stage. Stages of a request overlap: the sum is more "
            "than its time to first token.",
            queries=[Query(mean(metric), name) for name, metric in STAGES],
        ),
        Panel(
            title="Work in each stage", unit="short", is_stacked=True,
            text="Seconds that were spent in a stage per second: how many pieces of work were there at once.",
            queries=[Query(rate(f"{metric}_sum"), name) for name, metric in STAGES],
        ),
        Panel(
            title="Stages, P95", unit="s",
            text="Of one piece of work. Queue and prefill have vLLM's bounds, which begin at 0.3 s.",
            queries=[Query(quantile(0.95, metric), name) for name, metric in STAGES],
        ),
    ]  # fmt: skip


def _pools() -> list[Panel]:
    of_pool = f"{total('pool_used_bytes', 'worker')} / {total('pool_bytes', 'worker')}"
    return [
        Panel(
            title="Memory in use", unit="percentunit", most=1.0,
            text="The KV cache: what requests hold. Pools: in use or cached; a full pool of embeddings is "
            "normal, its oldest entries are evicted.",
            queries=[
                Query(f"max by (worker) (vlm_kv_cache_usage_perc{OF})", "KV cache {{worker}}"),
                Query(of_pool, "pool {{worker}}"),
            ],
        ),
        Panel(
            title="Cache hits", unit="percentunit", most=1.0,
            text="Of the tokens of prompts, and of the chunks of pictures and videos.",
            queries=[
                Query(ratio("prefix_cache_hits_total", "prefix_cache_queries_total"), "prefix cache"),
                Query(ratio("mm_cache_hits_total", "mm_cache_queries_total"), "embeddings"),
            ],
        ),
        Panel(
            title="Bytes between processes", unit="Bps", text="Pixels and embeddings, by transport.",
            queries=[Query(rate("transport_bytes_total", "worker, transport"), "{{worker}} {{transport}}")],
        ),
        Panel(
            title="Blocks, slots, leases", text="Of the KV cache, of sequences, of embeddings.",
            queries=[
                Query(total("free_blocks"), "free blocks"), Query(total("cached_blocks"), "cached blocks"),
                Query(total("free_slots"), "free slots"), Query(total("leases"), "leases"),
            ],
        ),
    ]  # fmt: skip


def _recovery() -> list[Panel]:
    return [
        Panel(
            title="Restarts", text="Workers that were replaced.",
            queries=[Query(
                f"sum by (worker) (increase(vlm_worker_restarts_total{OF}[$__rate_interval]))", "{{worker}}",
            )],
        ),
        Panel(
            title="Requests and deaths", text="Given up is the one that a client sees.",
            queries=[
                Query(rate("resubmitted_total"), "submitted again/s"),
                Query(rate("interrupted_total"), "interrupted/s"),
                Query(rate("num_preemptions_total"), "preempted/s"),
                Query(rate("given_up_total"), "given up/s"),
            ],
        ),
        Panel(
            title="Refused and dropped", text="Requests, and messages that nobody could read or needs.",
            queries=[
                Query(rate("refused_requests_total"), "refused requests/s"),
                Query(rate("refused_messages_total"), "refused messages/s"),
                Query(rate("stale_messages_total"), "stale messages/s"),
            ],
        ),
    ]  # fmt: skip


def _guesses() -> list[Panel]:
    accepted, drafts = "spec_decode_num_accepted_tokens_total", "spec_decode_num_drafts_total"
    of_place = "spec_decode_num_accepted_tokens_per_pos_total"
    return [
        Panel(
            title="Guesses that were right", unit="percentunit", most=1.0, text="Of all guessed tokens.",
            queries=[Query(ratio(accepted, "spec_decode_num_draft_tokens_total"), "right")],
        ),
        Panel(
            title="Tokens a step with guesses", text="1 without any right guess.",
            queries=[Query(f"1 + {ratio(accepted, drafts)}", "tokens")],
        ),
        Panel(
            title="Right, by place", unit="percentunit", most=1.0, text="The first guess is place 0.",
            queries=[Query(f"{rate(of_place, 'position')} / scalar({rate(drafts)})", "place {{position}}")],
        ),
    ]  # fmt: skip


def _keys() -> list[Panel]:
    ttft = quantile(0.95, "key_time_to_first_token_seconds", "key")
    return [
        Panel(
            title="Requests by key", text="Only where API keys are in use.", unit="reqps", is_stacked=True,
            queries=[Query(rate("key_requests_total", "key"), "{{key}}")],
        ),
        Panel(
            title="Tokens by key", text="Of prompts and answers.", is_stacked=True,
            queries=[
                Query(rate("key_prompt_tokens_total", "key"), "{{key}} prompt"),
                Query(rate("key_generation_tokens_total", "key"), "{{key}} answer"),
            ],
        ),
        Panel(title="TTFT P95 by key", text="At the endpoint.", unit="s", queries=[Query(ttft, "{{key}}")]),
        Panel(
            title="Refused by key", text="Requests that ended with an error.", unit="reqps",
            queries=[Query(rate("key_refused_requests_total", "key"), "{{key}}")],
        ),
    ]  # fmt: skip


# Grafana's JSON.


def dashboard() -> dict[str, Any]:
    return {
        "title": "vlm-pipeline",
        "uid": "vlm-pipeline",
        "description": "Latency, throughput, stages, caches and recovery of a vlm-pipeline server",
        "tags": ["vlm-pipeline"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair over all panels
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "panels": _placed(rows()),
    }


def _variables() -> list[dict[str, Any]]:
    known = "label_values(vlm_worker_ready, instance)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance", "label": "Server", "type": "query", "datasource": SOURCE, "query": known,
            "definition": known, "refresh": 2, "includeAll": True, "multi": True, "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]  # fmt: skip


def _placed(all_rows: Sequence[Row]) -> list[dict[str, Any]]:
    placed: list[dict[str, Any]] = []
    y = 0
    for row in all_rows:
        bar = {"type": "row", "title": row.title, "collapsed": False, "panels": []}
        placed.append({**bar, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        y += 1
        are_stats = all(panel.is_stat for panel in row.panels)
        width = WIDTH // len(row.panels) if are_stats or len(row.panels) == 3 else WIDTH // 2
        width = WIDTH // 3 if len(row.panels) == 6 else width
        height = STAT_HEIGHT if are_stats else HEIGHT
        for number, panel in enumerate(row.panels):
            column, line = number % (WIDTH // width), number // (WIDTH // width)
            place = {"x": column * width, "y": y + line * height, "w": width, "h": height}
            placed.append({**_json_of(panel), "gridPos": place})
        y += -(-len(row.panels) * width // WIDTH) * height
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]


def _json_of(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.is_stat:
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
        fill = 40 if panel.is_stacked else 8
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": fill,
            "showPoints": "never",
            "stacking": stacking,
        }
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
        }
        for number, query in enumerate(panel.queries)
    ]
    return {
        "type": "stat" if panel.is_stat else "timeseries", "title": panel.title, "description": panel.text,
        "datasource": SOURCE, "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
        "targets": targets,
    }  # fmt: skip


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.parent.mkdir(exist_ok=True)
    DASHBOARD.write_text(text())
