# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The dashboard and the alerts ask for metrics and labels that there are, and the guide says what to do about each."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from kvzip import SwapEngine

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "contrib" / "grafana-dashboard.json"
RULES = ROOT / "contrib" / "kvzip.rules.yml"
GUIDE = ROOT / "docs" / "guides" / "operate.md"
GIVEN = {"instance", "le", "engine"}  # by Prometheus, by histograms, by the collector


def exported() -> dict[str, set[str]]:
    """Labels by the names that Prometheus sees."""
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()  # tested against the code by test_metrics.py
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in re.findall(
        r"^\| `(kvzip_\w+)` \| \w+ \| (.*?) ?\|", page, re.MULTILINE)}  # fmt: skip
    names: dict[str, set[str]] = {}
    with SwapEngine(1 << 20) as engine:
        for family in engine.metrics().families:
            suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
            names |= {family.name + suffix: documented[family.name] for suffix in suffixes}
    source = ast.parse((ROOT / "adapters" / "vllm" / "metrics.py").read_text())  # importing it needs vLLM
    values = {
        n.targets[0].id: n.value
        for n in source.body
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
    }
    names |= {f"vllm:kvzip_{name}": set() for name in ast.literal_eval(values["GAUGES"])}
    names |= {f"vllm:kvzip_{name}_total": set() for name in ast.literal_eval(values["COUNTERS"])}
    return names | {f"vllm:kvzip_{ast.literal_eval(values['FALLBACKS'])}_total": {"reason"}}


def dashboard() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def rules() -> list[str]:
    return re.findall(r"^ +expr: (.*)$", RULES.read_text(), re.MULTILINE)


@pytest.mark.parametrize("expressions", [dashboard, rules], ids=["dashboard", "rules"])
def test_every_metric_and_label_exists(expressions: object) -> None:
    names = exported()
    asked = expressions()  # type: ignore[operator]
    assert len(asked) > 10
    for expression in asked:
        metrics = re.findall(r"((?:vllm:)?kvzip_\w+)(?:\{(.*?)\})?", expression)
        assert metrics, expression
        labels = set[str]()
        for metric, chosen in metrics:
            assert metric in names, f"{metric} in {expression}"
            labels |= names[metric]
            assert set(re.findall(r"(\w+)=~?", chosen)) <= names[metric] | GIVEN, expression
        grouped = {w for group in re.findall(r"(?:by|ignoring) \((.*?)\)", expression) for w in group.split(", ")}
        assert grouped <= labels | GIVEN, expression


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["title"] == board["uid"] == "kvzip"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]}
    assert len(places) == len(ids)  # none hides another


def test_the_guide_has_every_alert() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert len(set(alerts)) == len(alerts)
    text = GUIDE.read_text()
    assert [a for a in alerts if f"`{a}`" not in text] == []
    assert set(re.findall(r"`(Kvzip\w+)`", text)) <= set(alerts)


def test_the_rules_are_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    groups = yaml.safe_load(RULES.read_text())["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert all({"alert", "expr", "labels", "annotations"} <= set(rule) for rule in found)
    assert {rule["labels"]["severity"] for rule in found} == {"page", "ticket"}
