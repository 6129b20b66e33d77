"""`/metrics` of a real server that has answered a picture; the dashboard, the alerts and the page on it."""

from __future__ import annotations

import base64
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.metrics_core import Metric as ReadFamily
from prometheus_client.parser import text_string_to_metric_families

from tests.pictures import encode, scene
from tests.promql import check, uses
from tests.servers import Server
from tests.tools.test_dashboard import EXPRESSIONS, OF_ALERTS
from tools.metrics_page import PAGE, declarations, key_declarations, shown_name
from workers.api.key_metrics import PREFIX as KEY_PREFIX
from workers.api.metrics import PREFIX

KEY = "alices-key"
# As vLLM 0.11 and later show them: names, types and labels.
OF_VLLM = {
    "counter": {
        "num_preemptions": (), "prefix_cache_queries": (), "prefix_cache_hits": (), "mm_cache_queries": (),
        "mm_cache_hits": (), "prompt_tokens": (), "generation_tokens": (),
        "request_success": ("finished_reason",), "spec_decode_num_drafts": (),
        "spec_decode_num_draft_tokens": (), "spec_decode_num_accepted_tokens": (),
        "spec_decode_num_accepted_tokens_per_pos": ("position",),
    },
    "gauge": {"num_requests_running": (), "num_requests_waiting": (), "kv_cache_usage_perc": ()},
    "histogram": dict.fromkeys(
        (
            "iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens",
            "request_max_num_generation_tokens", "request_params_n", "request_params_max_tokens",
            "time_to_first_token_seconds", "inter_token_latency_seconds",
            "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
            "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
            "request_inference_time_seconds",
        ),
        (),
    ),
}  # fmt: skip


def read(server: Server) -> dict[str, ReadFamily]:
    headers = {"Authorization": "Bearer admins-key"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/metrics", headers=headers)) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def count(families: dict[str, ReadFamily], histogram: str) -> float:
    samples = families[histogram].samples
    return sum(sample.value for sample in samples if sample.name == f"{histogram}_count")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ReadFamily]]:
    folder = tmp_path_factory.mktemp("metrics")
    keys = folder / "keys"
    keys.write_text(f"alice:{KEY}\n")
    picture = folder / "scene.png"
    picture.write_bytes(encode(scene(3)))
    data = base64.b64encode(encode(scene(5))).decode()
    options = (
        "--api-key-file", str(keys), "--admin-key", "admins-key", "--speculative", "ngram",
        "--vllm-metric-names", "--allowed-local-media-path", str(folder),
    )  # fmt: skip
    with Server(*options) as server:
        client = server.client(KEY)
        for url in (f"data:image/png;base64,{data}", picture.as_uri()):
            client.chat.completions.create(
                model="", max_tokens=30, extra_body={"ignore_eos": True},
                messages=[{"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is it? What is it? What is it?"},
                ]}],
            )  # fmt: skip
        end = time.monotonic() + 10
        while count(found := read(server), "vlm_e2e_request_latency_seconds") < 2:
            assert time.monotonic() < end, "the workers report once a second"
            time.sleep(0.2)
        time.sleep(1.5)  # all of them
        found = read(server)
        yield found


def sampled(families: dict[str, ReadFamily]) -> tuple[dict[str, str], dict[str, set[str]]]:
    kinds, labels = {"up": "gauge"}, {"up": set[str]()}
    for family in families.values():
        for sample in family.samples:
            kinds[sample.name] = family.type
            labels[sample.name] = set(sample.labels)
    return kinds, labels


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *OF_ALERTS])
def test_every_query_finds_its_metrics(expression: str, families: dict[str, ReadFamily]) -> None:
    for use in uses(expression):
        check(use, *sampled(families))


def test_what_is_shown_is_on_the_page(families: dict[str, ReadFamily]) -> None:
    shown = {
        f"{name}_total" if family.type == "counter" else name
        for name, family in families.items()
        if name.startswith(PREFIX)
    }
    of_workers = [metric for metrics in declarations().values() for metric in metrics]
    listed = {shown_name(PREFIX, metric) for metric in of_workers}
    listed |= {shown_name(KEY_PREFIX, metric) for metric in key_declarations()}
    assert shown <= listed
    missing = {name for name in listed - shown if "snapshots" not in name}  # this model keeps no states
    of_gateway = {shown_name(PREFIX, metric) for metric in declarations()["gateway: with --direct-port"]}
    of_carrier = {shown_name(PREFIX, metric) for metric in declarations()["carrier: on several nodes"]}
    assert missing <= {*of_gateway, *of_carrier, "vlm_dropped_spans_total"}
    assert all(f"`{name}`" in PAGE.read_text() for name in shown)


def test_each_stage_of_a_picture_is_measured(families: dict[str, ReadFamily]) -> None:
    counts = {
        name: count(families, f"vlm_{name}_seconds")
        for name in (
            "stage_fetch", "stage_media_decode", "stage_vit_wait", "stage_vit", "stage_hand_off",
            "request_queue_time", "request_prefill_time", "request_decode_time", "time_to_first_token",
            "key_time_to_first_token", "key_e2e_request_latency",
        )
    }  # fmt: skip
    assert counts.pop("stage_fetch") == 1, "of the file alone: the other picture came with its message"
    assert set(counts.values()) == {2}, counts
    of_keys = {sample.labels["key"]: sample.value for sample in families["vlm_key_requests"].samples}
    assert of_keys == {"alice": 2, "": 0}
    (bytes_of,) = {
        sample.value
        for sample in families["vlm_transport_bytes"].samples
        if sample.labels["worker"] == "vit.0" and sample.labels["transport"] == "host"
    }
    assert bytes_of > 2 * 1024


def test_the_times_of_a_request_add_up(families: dict[str, ReadFamily]) -> None:
    total = {
        name: sum(one.value for one in families[f"vlm_{name}"].samples if one.name == f"vlm_{name}_sum")
        for name in (
            "time_to_first_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "request_inference_time_seconds", "e2e_request_latency_seconds",
        )
    }  # fmt: skip
    assert 0 < total["request_decode_time_seconds"] < total["request_inference_time_seconds"]
    first = total["request_queue_time_seconds"] + total["request_prefill_time_seconds"]
    assert 0 < first <= total["time_to_first_token_seconds"] < total["e2e_request_latency_seconds"] < 120


def test_vllms_metrics_are_as_vllm_shows_them(families: dict[str, ReadFamily]) -> None:
    shown = {name.removeprefix("vllm:"): family for name, family in families.items() if ":" in name}
    assert {kind: {name for name, family in shown.items() if family.type == kind} for kind in OF_VLLM} == {
        kind: set(names) for kind, names in OF_VLLM.items()
    }
    for names in OF_VLLM.values():
        for name, more in names.items():
            labels = {frozenset(sample.labels) - {"le"} for sample in shown[name].samples}
            assert labels == {frozenset({"model_name", "engine", *more})}, name
    reasons = {one.labels["finished_reason"]: one.value for one in shown["request_success"].samples}
    assert reasons == {"stop": 0, "length": 2, "abort": 0, "error": 0}
