"""The configuration and the rules of deploy/prometheus, judged by promtool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.programs import program

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(scope="module")
def alerts(deploy: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load((deploy / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_promtool_accepts_the_configuration_and_its_rules(deploy: Path) -> None:
    command = [program("promtool"), "check", "config", str(deploy / "prometheus" / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_promtools_cases_of_the_rules_pass(deploy: Path) -> None:
    command = [program("promtool"), "test", "rules", str(deploy / "prometheus" / "tests.yml")]
    tested = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_case_in_which_it_fires(deploy: Path, alerts: list[dict[str, Any]]) -> None:
    cases = yaml.safe_load((deploy / "prometheus" / "tests.yml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in alerts}


def test_every_alert_says_how_urgent_it_is_and_where_to_read_what_to_do(alerts: list[dict[str, Any]]) -> None:
    sections = re.split(r"^##+ (.*)$", GUIDE.read_text(), flags=re.MULTILINE)
    texts = {title.lower().replace(" ", "-"): text for title, text in zip(sections[1::2], sections[2::2], strict=True)}
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        file, anchor = alert["annotations"]["runbook"].split("#")
        assert file == "docs/operations.md"
        assert f"`{alert['alert']}`" in texts[anchor], alert["alert"]
