from __future__ import annotations

import xml.etree.ElementTree as ET

from tools.bench_serving import TABLE, Result, plot, summarize
from tools.plots import Bar, Line, bars, lines, page, shares, shown

NS = "{http://www.w3.org/2000/svg}"


def test_lines_stay_within_their_panel_and_names_are_no_markup() -> None:
    drawn = lines("<b> & c", [Line("a<b", [(0, 1), (2, 4)]), Line("", [(1, 2)])], 100, 50, 300, 200)
    svg = ET.fromstring(page(500, 300, drawn))
    texts = [element.text for element in svg.iter(f"{NS}text")]
    assert {"<b> & c", "a<b"} <= set(texts)
    points = [
        point.split(",") for line in svg.iter(f"{NS}polyline") for point in line.attrib["points"].split()
    ]
    assert len(points) == 3
    for x, y in points:
        assert 100 <= float(x) <= 400
        assert 50 <= float(y) <= 250
    assert float(points[1][1]) < float(points[0][1]), "more is higher up"


def test_bars_have_their_length_and_unknown_ones_none() -> None:
    drawn = bars("t", [Bar("a", 2, 1, 4), Bar("b", None), Bar("c", 4, 4, 4)], 0, 0, 300, 100)
    svg = ET.fromstring(page(300, 100, drawn))
    widths = [float(one.attrib["width"]) for one in svg.iter(f"{NS}rect")][1:]
    assert widths[1] == 2 * widths[0] == 140


def test_a_plot_without_anything_is_a_plot() -> None:
    ET.fromstring(page(9, 9, [*lines("t", [], 0, 0, 100, 100), *bars("t", [], 0, 0, 99, 9)]))


def test_shares() -> None:
    assert shares([3.0, 1.0]) == [(1.0, 50.0), (3.0, 100.0)]
    assert (shown(123.4), shown(12.34), shown(1.234)) == ("123", "12.3", "1.23")


def test_the_plot_of_a_benchmark_has_both_servers() -> None:
    fast = [
        Result(0.0, ttft=0.1, e2el=0.5, arrivals=[0.1, 0.3, 0.5], num_prompt_tokens=3, num_output_tokens=3)
    ]
    slow = [Result(1.0, ttft=0.2, e2el=1.0, arrivals=[1.2, 2.0], num_prompt_tokens=3, num_output_tokens=2)]
    failed = [Result(1.0, error="503")]
    served = {"http://a": fast, "http://b": slow, "http://c": failed}
    rounds = {url: [summarize(results, 2.0, {})] for url, results in served.items()}
    svg = ET.fromstring(plot(served, rounds))
    texts = [element.text for element in svg.iter(f"{NS}text")]
    assert set(TABLE) <= set(texts)
    assert texts.count("http://a") == 2 + len(TABLE)
    assert "Inter-token latency, ms over s: http://b" in texts
