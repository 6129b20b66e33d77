"""The load generator: its figures from given times, and a run against the server."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from aiohttp import test_utils, web

from tests.servers import Server
from tools.bench_serving import (
    Result,
    Workload,
    open_session,
    parse_limits,
    parse_sizes,
    plot,
    print_ratios,
    send,
    summarize,
)

TWO = [
    Result(
        sent=10.0,
        ttft=0.2,
        e2el=1.2,
        arrivals=[10.2, 10.4, 11.2],
        num_prompt_tokens=8,
        num_output_tokens=3,
        num_cached_tokens=4,
    ),
    Result(sent=10.0, ttft=0.6, e2el=0.6, arrivals=[10.6], num_prompt_tokens=8, num_output_tokens=1, turn=1),
]


def test_metrics_are_those_of_the_definitions() -> None:
    summary = summarize(
        [*TWO, Result(sent=10.0, error="503 busy")], wall=2.0, limits=parse_limits(["ttft:500"])
    )
    assert (summary["completed"], summary["failed"], summary["errors"]) == (2, 1, ["503 busy"])
    assert summary["ttft_ms"]["mean"] == pytest.approx(400)
    assert summary["tpot_ms"] == pytest.approx({"mean": 500, "median": 500, "p99": 500, "max": 500}), (
        "one token has no TPOT"
    )
    assert summary["itl_ms"]["max"] == pytest.approx(800)
    assert summary["e2el_ms"]["median"] == pytest.approx(900)
    assert summary["goodput"] == 0.5, "one of them within 500 ms, in two seconds"
    assert summary["output_tokens_per_s"] == 2.0
    assert summary["cached_prompt_tokens"] == 0.25
    assert [turn["mean"] for turn in summary["ttft_ms_by_turn"]] == pytest.approx([200, 600])


@pytest.mark.parametrize(
    ("limits", "kept"),
    [("itl:900", True), ("itl:700", False), ("tpot:400", False), ("e2el:1300", True), ("e2el:1000", False)],
)
def test_goodput_limits(limits: str, kept: bool) -> None:
    assert TWO[0].keeps(parse_limits([limits])) is kept


def test_an_unknown_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'speed'"):
        parse_limits(["speed:3"])


def test_loads_repeat_by_seed_and_pictures_are_distinct_or_shared() -> None:
    workload = Workload(num_words=5, num_images=2, sizes=parse_sizes("28x28,56x28"), num_turns=2)
    chats = workload.chats(3, random.Random(1))
    assert chats == workload.chats(3, random.Random(1))
    assert chats != workload.chats(3, random.Random(2))
    assert [[part["type"] for part in turn] for turn in chats[0]] == [
        ["image_url", "image_url", "text"],
        ["text"],
    ]
    pictures = [part["image_url"]["url"] for turns in chats for part in turns[0][:2]]
    assert len(set(pictures)) == 6
    shared = Workload(num_images=2, sizes=((28, 28),), num_shared_images=2).chats(8, random.Random(1))
    assert len({part["image_url"]["url"] for turns in shared for part in turns[0][:2]}) == 2


def test_the_plot_has_a_line_a_stream() -> None:
    results = [*TWO, TWO[0]]
    svg = ET.fromstring(plot({"a": results}, {"a": [summarize(results, 1.0, {})]}))
    lines = [line.attrib["points"].split() for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines[:-2]] == [2, 2], "the stream of one token has no gaps"
    assert len(lines[-2]) == 3, "the distribution of TTFT"


def test_two_servers_are_compared_with_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    slow = [Result(sent=0.0, ttft=0.4, e2el=2.4, arrivals=[0.4, 0.8, 2.4], num_output_tokens=3)]
    rounds = {"a": [summarize(TWO[:1], 1.0, {})], "b": [summarize(slow, 1.0, {})]}
    medians = print_ratios(["a", "b"], rounds)
    assert medians["b"]["ttft_ms.median"] == pytest.approx(400)
    assert "| ttft_ms.median | 200.0 | 400.0 | 2.00 |" in capsys.readouterr().out


def test_a_run_against_a_server(tmp_path: Path) -> None:
    with Server("--max-model-len", "1024", "--kv-cache-gib", "0.25") as server:
        command = [
            sys.executable, "-m", "tools.bench_serving", "--base-url", server.url, server.url + "/",
            "--num-prompts", "3", "--input-words", "8",
            "--output-tokens", "5", "--images", "1", "--image-size", "112x112", "--turns", "2", "--goodput",
            "e2el:60000",
            "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "itl.svg"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    for (summary,) in figures["rounds"].values():
        assert (summary["completed"], summary["failed"]) == (6, 0)
        assert summary["output_tokens_per_s"] * summary["wall_s"] == pytest.approx(30)
        assert summary["goodput"] > 0
    assert figures["rounds"][server.url][0]["ttft_ms_by_turn"][1]["median"] > 0
    assert (tmp_path / "itl.svg").is_file()


@pytest.mark.parametrize(("asks", "num_arrivals"), [(False, 2), (True, 3)])
def test_a_token_without_text_is_no_gap_where_token_ids_are_asked_for(asks: bool, num_arrivals: int) -> None:
    """The bytes of a character come in several tokens: its text comes with the last of them."""

    async def answer(request: web.Request) -> web.Response:
        tells = bool((await request.json()).get("return_token_ids"))
        chunks: list[dict[str, Any]] = []
        for number, text in enumerate(("a", "", "é")):
            choice: dict[str, Any] = {"delta": {"content": text} if text or tells else {}}
            if tells:
                choice["token_ids"] = [number]
            if text or tells:
                chunks.append({"choices": [choice]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}})
        return web.Response(text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))

    async def ask() -> Result:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", answer)
        workload = Workload(num_words=1, wants_token_ids=asks)
        async with test_utils.TestServer(application) as server, open_session() as session:
            return await send(session, str(server.make_url("")), workload.body([]))

    result = asyncio.run(ask())
    assert (result.error, result.text, len(result.arrivals)) == ("", "aé", num_arrivals)
