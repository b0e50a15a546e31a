"""The report and the plain data of a comparison."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

import pytest

from kvfleet.replay.expect import parse_expectation
from kvfleet.replay.plots import Axis, Curve, curves, shades
from kvfleet.replay.report import html_report
from kvfleet.replay.results import Comparison
from kvfleet.replay.slo import parse_slo
from tests.replay.fleets import fleet, replayed, sessions, shared_prefix


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Two strategies over one trace."""
    trace = shared_prefix(150)
    results = [replayed(trace, fleet(strategy=name)).run(f"<{name}>") for name in ("round_robin", "hybrid_score")]
    return Comparison.of(results, parse_slo("ttft < 200ms"))


def test_the_page_needs_nothing_else(comparison: Comparison) -> None:
    """No script, no address, no font or picture from elsewhere."""
    page = html_report(comparison)
    assert not re.search(r"https?:(?!//engine-)|<script|<link|@import|url\(|src=", page)


def test_the_page_has_every_figure_plot_and_replica(comparison: Comparison) -> None:
    """And names are escaped."""
    expectation = parse_expectation("ttft_p99 < 1us", ["<round_robin>", "<hybrid_score>"])
    page = html_report(comparison, expectation.check(comparison.figures))
    for standing in comparison.standings:
        assert all(f">{name}<" in page for name in standing.figures)
        assert page.count(f">{standing.replicas[0].replica}<") >= 2
    assert "<round_robin>" not in page
    assert page.count("<svg") == 5
    assert page.count(">fails<") == 2


def test_every_plot_is_sound_svg(comparison: Comparison) -> None:
    """No value leaves the frame, none is missing."""
    for found in re.findall(r"<svg.*?</svg>", html_report(comparison), re.DOTALL):
        root = ET.fromstring(found)  # noqa: S314 - our own
        wide, high = map(float, root.attrib["viewBox"].split()[2:])
        for line in root.iter("polyline"):
            points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
            assert points
            assert all(0 <= x <= wide and 0 <= y <= high for x, y in points)


def test_the_plain_data_says_what_was_replayed_and_how_it_went(comparison: Comparison) -> None:
    """It is JSON, and speaks of the same figures."""
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert plain["trace"]["requests"] == 150
    assert (plain["loop"], plain["slo"], plain["speed"]) == ("open", "ttft <= 200 ms", 1.0)
    first, second = plain["pipelines"]
    assert first["figures"] == comparison.figures["<round_robin>"]
    assert first["against_first"] == []
    assert {one["figure"] for one in second["against_first"]} == {"ttft_mean", "e2e_mean", "cached_share"}
    assert sum(one["requests"] for one in first["replicas"]) == 150


def test_a_closed_loop_says_so() -> None:
    """In the data and on the page."""
    found = Comparison.of([replayed(sessions(5)).run("a")], parse_slo("ttft < 1s"))
    assert found.to_dict()["loop"] == "closed"
    assert "closed loop" in html_report(found)


def test_a_replay_without_a_single_answer_can_be_reported() -> None:
    """Plots are empty then."""
    trace = shared_prefix(5, system_tokens=500_000.0)
    found = Comparison.of([replayed(trace).run("a")], parse_slo("ttft < 1s"))
    assert found.standings[0].errors == {"context_length_exceeded": 5}
    assert "5 context_length_exceeded" in html_report(found)


def test_axes_are_marked_at_round_values() -> None:
    """Few of them, within the ends."""
    assert Axis("", 0.0, 3537.0).ticks() == [0.0, 1000.0, 2000.0, 3000.0]
    assert Axis("", 0.02, 30.0, is_log=True).ticks() == [0.1, 1.0, 10.0]
    assert Axis("", 0.5, 4.0, is_log=True).ticks() == [0.5, 1.0, 2.0]
    assert Axis("", 1.0, 1.0).ticks() == [1.0]


def test_long_curves_are_thinned_and_many_rows_are_drawn_small() -> None:
    """A report of many requests and replicas stays small."""
    line = Curve("many", 0, [(float(i), float(i % 7)) for i in range(100_000)])
    assert len(curves([line], Axis("x", 0, 1e5), Axis("y", 0, 7), "many")) < 20_000
    rows = [(f"replica-{i}", [1.0] * 60) for i in range(200)]
    assert 'viewBox="0 0 560 ' in shades(rows, Axis("x", 0, 60), 1.0, "rows")
