"""The Grafana dashboard and the alert rules ask for metrics and labels that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import ruamel.yaml

from kvfleet.errors import Fault
from kvfleet.gateway.meters import GATEWAY_METRICS
from kvfleet.telemetry.metric_table import METRICS, MetricInfo
from tests.docs.pages import ROOT

MONITORING = ROOT / "docs" / "monitoring"
GRAFANA: dict[str, Any] = json.loads((MONITORING / "grafana.json").read_text())
ALERTS: dict[str, Any] = ruamel.yaml.YAML(typ="safe", pure=True).load((MONITORING / "alerts.yaml").read_text())

PROMETHEUS_LABELS = {"job", "instance"}
STATUSES = {"success", "error", "refused", "no_candidates", "cancelled"}
PROMTOOL = shutil.which("promtool") or ""


def samples(info: MetricInfo) -> dict[str, set[str]]:
    """The samples of a metric, and the labels each has."""
    labels = set(info.labels) | PROMETHEUS_LABELS
    if info.type != "histogram":
        return {info.name: labels}
    return {f"{info.name}_bucket": {*labels, "le"}, f"{info.name}_sum": labels, f"{info.name}_count": labels}


SAMPLES = {name: labels for info in (*METRICS, *GATEWAY_METRICS) for name, labels in samples(info).items()}
PANELS = [panel for panel in GRAFANA["panels"] if panel["type"] != "row"]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
EXPRESSIONS = {
    **{f"panel {p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p["targets"]},
    **{f"alert {rule['alert']}": rule["expr"] for rule in RULES},
}
LEGENDS = [(target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]


def asked(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The samples an expression asks for, each with its label matchers."""
    for name, matchers in re.findall(r"(kvfleet_\w+)(?:\{([^}]*)\})?", expression):
        yield name, dict(re.findall(r"(\w+)\s*[=!]~?\s*\"([^\"]*)\"", matchers))


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_what_is_asked_for_is_there(expression: str) -> None:
    """Every sample, every label that is matched or grouped by, and every value that is matched."""
    found = list(asked(expression))
    assert found
    for name, matchers in found:
        assert name in SAMPLES
        assert set(matchers) <= SAMPLES[name]
        known = {"status": STATUSES, "outcome": {"ok", *(fault.value for fault in Fault)}}
        for label, values in matchers.items():
            if label in known and not name.startswith("kvfleet_gateway"):
                assert set(values.split("|")) <= known[label]
    grouped = {
        label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in labels.split(",")
    }
    assert grouped <= set.union(*(SAMPLES[name] for name, _ in found))


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_counters_are_read_as_rates(expression: str) -> None:
    """A counter's total means nothing: it begins anew with every start."""
    counters = {n for info in METRICS if info.type != "gauge" for n in samples(info)}
    for name in {name for name, _ in asked(expression)} & counters:
        assert re.search(rf"(?:rate|increase)\({name}\b", expression)


@pytest.mark.parametrize(("expression", "legend"), LEGENDS)
def test_legends_name_labels_that_are_left(expression: str, legend: str) -> None:
    """A label that an aggregation has taken away would stand empty."""
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        groups = re.findall(r"\bby \(([^)]*)\)", expression)
        left = set(re.split(r",\s*", groups[0])) if groups else SAMPLES[next(asked(expression))[0]]
        assert label in left


def test_panels_are_whole() -> None:
    """Each has a title, a description, a unit and a data source that can be chosen; none lies over another."""
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in GRAFANA["panels"]}) == len(GRAFANA["panels"])
    for one, other in combinations([panel["gridPos"] for panel in GRAFANA["panels"]], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_below


def test_alerts_are_whole() -> None:
    """Each says how bad it is, what it is and what to do, and has a name of its own."""
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith((".", "?"))
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


@pytest.mark.skipif(not PROMTOOL, reason="there is no promtool here; it comes with Prometheus")
def test_prometheus_agrees() -> None:
    """Prometheus reads the rules, and they fire when they should and only then."""
    tests = ROOT / "tests" / "docs" / "alerts.test.yaml"
    done = subprocess.run([PROMTOOL, "test", "rules", str(tests)], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
