"""Prometheus' own checker over the shipped configuration; alerts against runbook and tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.programs import ROOT, program

FOLDER = ROOT / "deploy" / "prometheus"
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [program("promtool"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def runbook() -> dict[str, str]:
    """The entries by title."""
    parts = re.split(r"^## (.+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def panels() -> dict[str, list[str]]:
    """The queries of the dashboard's panels by title."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "photon.json").read_text())
    return {
        panel["title"]: [target["expr"] for target in panel["targets"]]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }


@pytest.mark.parametrize(
    "arguments", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_agrees(arguments: str) -> None:
    result = promtool(FOLDER, *arguments.split())
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("alert", "text", "replacement"),
    [
        ("PhotonShedding", "photon_shed_total", "photon_shed"),
        ("PhotonEngineStalled", "> 30 and", "> 3000 and"),
        ("PhotonDown", "severity: page", "severity: none"),
        ("PhotonQueueGrowing", "min_over_time", "max_over_time"),
    ],
)
def test_the_rule_tests_notice_a_change(tmp_path: Path, alert: str, text: str, replacement: str) -> None:
    """The alert's own tests, of a copy of the rules: they pass, and fail once its rule is changed."""
    rules, tests = tmp_path / "alerts.yml", tmp_path / "alerts_test.yml"
    shutil.copy(FOLDER / "alerts.yml", rules)
    content = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())
    content["tests"] = [test for test in content["tests"] if test["name"].split()[0] == alert]
    assert content["tests"]
    tests.write_text(yaml.safe_dump(content))
    assert promtool(tmp_path, "test", "rules", tests.name).returncode == 0
    before, name, rule = rules.read_text().partition(f"alert: {alert}\n")
    assert text in rule
    rules.write_text(before + name + rule.replace(text, replacement, 1))
    assert promtool(tmp_path, "test", "rules", tests.name).returncode != 0


def test_the_dashboard_asks_in_proper_promql(tmp_path: Path) -> None:
    asked = [query for queries in panels().values() for query in queries]
    assert asked
    values = {"$__rate_interval": "5m", "$instance": ".*"}
    for variable, value in values.items():
        asked = [text.replace(variable, value) for text in asked]
    assert not any("$" in text for text in asked), "a variable that the dashboard does not have"
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(asked)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    result = promtool(tmp_path, "check", "rules", "panels.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_is_tested_firing_and_quiet() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    outcomes: dict[str, set[bool]] = {name: set() for name in alerts()}
    for test in tests:
        for expected in test["alert_rule_test"]:
            outcomes[expected["alertname"]].add(bool(expected["exp_alerts"]))
    assert all(outcome == {True, False} for outcome in outcomes.values()), outcomes


def test_each_alert_has_a_runbook_entry_and_each_entry_an_alert() -> None:
    assert set(runbook()) == set(alerts())


@pytest.mark.parametrize("name", alerts())
def test_an_alert_leads_to_its_entry(name: str) -> None:
    rule = alerts()[name]
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOK.relative_to(ROOT)}#{name.lower()}"
    assert rule["annotations"]["summary"]
    assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("name", alerts())
def test_an_entry_says_what_it_means_how_to_see_it_and_what_to_do(name: str) -> None:
    meaning, see, *steps = runbook()[name].strip().split("\n\n")
    assert meaning
    assert see.startswith("See: ")
    assert steps[0].startswith("1. ")
    # What to look at is what the alert looked at: a metric of its rule, or a panel that shows it.
    metrics = set(re.findall(r"\b(?:photon|process)_[a-z_]+|\bup\b", alerts()[name]["expr"]))
    shown = set(re.findall(r"[a-z_]+", see))
    for title in re.findall(r"\*\*(.+?)\*\*", see):
        for expr in panels()[title]:
            shown |= set(re.findall(r"[a-z_]+", expr))
    assert metrics <= shown
