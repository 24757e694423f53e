"""Prometheus' own checker over the shipped configuration, and alerts against their runbook and their tests."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    result = promtool(FOLDER, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"photon_shed_total", "photon_shed"), (r"> 30 and", "> 3000 and"), (r"severity: page", "severity: none")],
)
def test_the_rule_tests_notice_a_change(tmp_path: Path, pattern: str, replacement: str) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "alerts.yml"
    changed, count = re.subn(pattern, replacement, path.read_text())
    assert count
    path.write_text(changed)
    assert promtool(tmp_path, "test", "rules", "alerts_test.yml").returncode != 0


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
    assert "\n1. " in runbook()[name], "an entry says what to do"


def test_links_of_the_runbook_lead_somewhere() -> None:
    anchors = {title.lower() for title in runbook()}
    text = RUNBOOK.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path:
            assert (RUNBOOK.parent / path).is_file(), target
        else:
            assert anchor in anchors, target
