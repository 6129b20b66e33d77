"""Loads, fits, rooflines and searches, and the command."""

from __future__ import annotations

import json
import random
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipeline.families import ModelInfo
from pipeline.process.trace import TraceSpan
from tools import simulate
from tools.simulation.fit import Spans, fit, least_squares, step_rows
from tools.simulation.load import Camera, Shape, random_load, read_trace
from tools.simulation.pipeline import Size
from tools.simulation.report import Summary
from tools.simulation.search import Goals, fewest, search
from tools.simulation.stages import (
    EncodeCost,
    Machine,
    StageTimes,
    StepCost,
    read_stages,
    roofline,
    write_stages,
)


def test_pictures_are_as_the_model_sees_them(info: ModelInfo) -> None:
    picture = Camera(info).picture(448, 224, "a")
    assert (picture.grid, picture.num_tokens) == ((1, 16, 32), 128)
    assert picture.megapixels == pytest.approx(0.100352)
    assert picture.pixel_bytes == 3 * 448 * 224


def test_arrivals_are_poisson_and_a_load_is_open_or_closed(info: ModelInfo) -> None:
    given = random_load(Shape(2000, 8, 1), Camera(info), random.Random(0), rate=4.0)
    assert given.submissions[-1].at == pytest.approx(2000 / 4, rel=0.1)
    for asked in ({}, {"rate": 1.0, "concurrency": 1}):
        with pytest.raises(ValueError, match="either a rate"):
            random_load(Shape(1, 1, 1), Camera(info), random.Random(0), **asked)  # type: ignore[arg-type]


def test_a_trace_file_is_read_and_a_wrong_one_refused(info: ModelInfo, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"at": 7.5, "text_tokens": 9, "output_tokens": 3, "images": ["224x224=logo", "448x448"]}\n'
        '{"at": 7.0, "text_tokens": 5, "output_tokens": 2, "images": ["224x224=logo"]}\n'
    )
    first, second = read_trace(file, Camera(info)).submissions
    assert (first.at, first.num_text_tokens, second.at) == (0.0, 5, 0.5)
    assert first.pictures[0] == second.pictures[0]
    assert second.pictures[1].num_tokens == 256
    for wrong, reason in (
        ("{}", "at"),
        ('{"at":0,"text_tokens":1,"output_tokens":1,"images":["9"]}', "WIDTH"),
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=reason):
            read_trace(file, Camera(info))


def test_stage_times_survive_their_file(tmp_path: Path) -> None:
    times = StageTimes(step=(StepCost(fixed_s=0.01),), encode=(EncodeCost(patch_s=1e-5),), sharing="turns")
    write_stages(tmp_path / "stages.json", times)
    assert read_stages(tmp_path / "stages.json") == times
    (tmp_path / "stages.json").write_text('{"step": [], "encode": []}')
    with pytest.raises(ValueError, match="at least one cost"):
        read_stages(tmp_path / "stages.json")


def test_a_fit_finds_the_factors_and_none_below_zero() -> None:
    rng = random.Random(0)
    rows = [(rng.randrange(1, 9), rng.randrange(0, 2000)) for _ in range(60)]
    found = least_squares(rows, [0.01 + 0.002 * one + 3e-6 * two for one, two in rows])
    assert found == pytest.approx([0.01, 0.002, 3e-6])
    assert least_squares([(x,) for x in (1, 2, 3, 4)], [4.0, 3.0, 2.0, 1.0])[1] == 0.0


def span(name: str, start: float, seconds: float, ids: tuple[str, ...], amount: int) -> TraceSpan:
    return TraceSpan(name, start, start + seconds, ids, amount)


def test_times_are_fitted_from_traces() -> None:
    """Of two requests with a picture: the second is computed beside the first one's decode."""
    step, encode = StepCost(fixed_s=0.01, prefill_s=1e-4), EncodeCost(fixed_s=0.002, patch_s=1e-5)

    def step_span(start: float, name: str, ids: tuple[str, ...], amount: int, num_prefill: int) -> TraceSpan:
        return span(name, start, step.seconds(0, 0, num_prefill, 0), ids, amount)

    found = {
        "preprocess.0": [
            span("prepare", 0.0, 0.003, ("a",), 0), span("prepare", 1.0, 0.003, ("b",), 0),
            span("tokenise", 0.0, 0.001, ("a",), 100), span("tokenise", 1.0, 0.001, ("b",), 300),
            span("decode picture", 0.003, 0.014, ("a",), 256),
            span("decode picture", 1.003, 0.024, ("b",), 1024),
        ],
        "vit.0": [
            span("encode", 0.02, encode.seconds(256, 0), ("a",), 256),
            span("encode", 1.03, encode.seconds(1024, 0) + 0.01, ("b",), 1024),
        ],
        "llm.0": [
            step_span(0.0251, "prefill", ("a",), 100, 100),
            step_span(1.03, "decode", ("a",), 1, 0),  # of which the ViT waits for 0.01 s
            step_span(1.06, "decode and prefill", ("a", "b"), 201, 200),
            step_span(1.0905, "decode and prefill", ("a", "b"), 101, 100),
            step_span(1.111, "decode", ("a", "b"), 2, 0),
        ],
    }  # fmt: skip
    rows = step_rows(Spans.of(found))
    assert [(row.num_decodes, row.num_prefill, row.num_pairs) for row in rows] == [
        (0, 100, 5000), (1, 0, 0), (1, 200, 20000), (1, 100, 25000), (2, 0, 0),
    ]  # fmt: skip
    assert rows[-1].num_context == 103 + 300
    times = fit(Spans.of(found), {"a": 0.1, "b": 0.2}, takes_turns=True)
    assert times.encode_seconds([512]) == pytest.approx(encode.seconds(512, 0))
    assert times.step_seconds(1, 100, 0, 0) == pytest.approx(0.01, rel=0.01)
    assert times.step_seconds(0, 0, 150, 150 * 75) == pytest.approx(0.025, rel=0.05)
    assert times.decode_picture_s + 0.1 * times.decode_megapixel_s == pytest.approx(0.014)
    assert times.prepare_s + 200 * times.prepare_token_s == pytest.approx(0.003)
    assert 0 < times.between_s < 0.001
    with pytest.raises(ValueError, match="0 spans of encode"):
        fit(Spans.of({**found, "vit.0": []}), {"a": 0.1, "b": 0.2}, takes_turns=True)


def test_a_roofline_reads_weights_for_few_tokens_and_computes_for_many(info: ModelInfo) -> None:
    machine = Machine(flops=1e15, bytes_per_s=1e12, efficiency=1.0, step_overhead_s=0.0)
    times = roofline(info, 10**9, info.text.num_layers, machine)
    assert times.step_seconds(1, 0, 0, 0) == pytest.approx(2e9 / 1e12)
    assert times.step_seconds(0, 0, 10_000, 0) == pytest.approx(2e9 * 10_000 / 1e15)
    context = 2 * info.text.num_layers * info.text.num_kv_heads * info.text.head_dim * 2
    assert times.step_seconds(1, 10**6, 0, 0) == pytest.approx((2e9 + 1e6 * context) / 1e12)
    two = roofline(info, 10**9, info.text.num_layers, machine, tp=2)
    assert two.step_seconds(1, 0, 0, 0) == pytest.approx(1e9 / 1e12)
    assert two.encode == times.encode, "a ViT has one GPU"


def test_the_fewest_that_meet_are_found() -> None:
    for least in range(1, 17):
        assert fewest(lambda count, least=least: count >= least, 16) == least  # type: ignore[misc]
    assert fewest(lambda count: False, 16) is None


def test_a_search_leaves_no_number_too_large() -> None:
    def run(size: Size) -> Summary:
        ttft = max(3 / size.num_groups, 5 / size.num_vits, 2 / size.num_readers)
        return Summary(0, ttft, 0, 2 / size.num_groups, 1, 1)

    assert search(run, Goals(ttft=1.0)).size == Size(num_vits=5, num_readers=2, num_groups=3)
    assert search(run, Goals(ttft=1.0, itl=0.5)).size == Size(num_vits=5, num_readers=2, num_groups=4)
    assert search(run, Goals(ttft=0.01), most=8).size is None


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    simulate.main()


def test_the_command_searches_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = StageTimes(
        step=(StepCost(fixed_s=0.01, decode_s=0.0005, prefill_s=1e-4),),
        encode=(EncodeCost(patch_s=1e-4),), decode_picture_s=0.03,
    )  # fmt: skip
    write_stages(tmp_path / "stages.json", stages)
    plot = tmp_path / "plot.svg"
    load = ["--rate", "25", "--images", "1", "--num-requests", "40", "--output-tokens", "8"]
    files = ["--stages", str(tmp_path / "stages.json"), "--plot", str(plot)]
    call([*files, *load, "--ttft", "0.5", "--most", "16"], monkeypatch)
    printed = capsys.readouterr().out
    assert "meets the goals" in printed
    assert "needed: " in printed
    assert "use of vit" in printed
    assert "nearly always" not in printed
    call([*files, "--concurrency", "16", "--num-requests", "40"], monkeypatch)
    assert "llm is nearly always in use" in capsys.readouterr().out
    words = [one.text for one in ET.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Time to first token: % of requests over ms", "vit.0"} <= set(words)
    with pytest.raises(SystemExit) as ended:
        call([*files, *load, "--ttft", "0.01", "--most", "2"], monkeypatch)
    assert ended.value.code == 1
    assert "No number of processes" in capsys.readouterr().out
    assert "TTFT P99" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either --stages"),
        (["--flops", "1e15"], "both --flops"),
        (["--stages", "x.json", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(arguments, monkeypatch)
    assert reason in capsys.readouterr().err


def test_files_that_are_none_end_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages.json").write_text(json.dumps({"imagine": 1}))
    with pytest.raises(SystemExit, match="has no stage times"):
        call(["--stages", str(tmp_path / "stages.json"), "--rate", "1"], monkeypatch)
