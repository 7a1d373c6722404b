"""Charts: well-formed SVG, marks where the values are, every name in the key, text escaped."""

import re
from xml.etree import ElementTree

import pytest

from fewstep.runtime.bench.charts import PLOT, TOP, bars, lines

NS = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    return ElementTree.fromstring(svg)


def test_lines_rise_with_their_values_and_meet_every_point():
    root = parsed(lines("t", {"a": [(1, 10.0), (4, 100.0), (2, 30.0)], "b <&>": [(1, 50.0)]}, x="steps", y="ms"))
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{NS}circle")]
    assert len(marks) == 4
    (x1, y1), (x2, y2), (x4, y4) = marks[:3]
    assert x1 < x2 < x4 and y1 > y2 > y4
    assert x2 - x1 == pytest.approx(x4 - x2, abs=0.2)  # 1, 2, 4 on a logarithmic axis
    assert y1 == pytest.approx(TOP + PLOT) and y4 == pytest.approx(TOP)
    said = [t.text for t in root.iter(f"{NS}text")]
    assert {"a", "b <&>", "t", "steps", "ms", "1", "2", "4", "10", "20", "50", "100"} <= set(said)


def test_one_point_and_equal_values_still_make_axes():
    assert parsed(lines("t", {"a": [(3, 10.0)]}, x="", y="")) is not None
    assert "nan" not in lines("t", {"a": [(1, 1e-5), (2, 1e-5)]}, x="", y="")


def test_bars_are_as_high_as_their_values_side_by_side_or_stacked():
    values = {"g": {"a": 2.0, "b": 6.0}}
    for stacked, high in ((False, 8.0), (True, 8.0)):
        root = parsed(bars("t", values, y="ratio", stacked=stacked))
        found = [r for r in root.iter(f"{NS}rect") if r.find(f"{NS}title") is not None]
        heights = [float(r.get("height")) for r in found]
        assert heights == pytest.approx([PLOT * 2 / high, PLOT * 6 / high], abs=0.1)
        lefts = [float(r.get("x")) for r in found]
        assert (lefts[0] == lefts[1]) is stacked
    stacked = re.findall(
        r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="#[0-9a-f]{6}"><title>',
        bars("t", values, y="", stacked=True),
    )
    assert float(stacked[1][0]) + float(stacked[1][1]) == pytest.approx(float(stacked[0][0]), abs=0.1)


def test_light_and_dark():
    assert "prefers-color-scheme:dark" in bars("t", {"g": {"a": 1.0}}, y="")
