"""The configuration and the rules of deploy/prometheus, judged by promtool."""

from __future__ import annotations

import subprocess
from pathlib import Path

from programs import program


def test_promtool_accepts_the_configuration_and_its_rules(deploy: Path) -> None:
    command = [program("promtool"), "check", "config", str(deploy / "prometheus" / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
