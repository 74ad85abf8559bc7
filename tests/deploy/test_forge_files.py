"""The workflow and the issue forms of a public forge, against the schemas that it publishes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FORGE = Path(__file__).parents[2] / ".github"


def test_the_workflow_fits_the_forge_s_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, str(FORGE / "workflows" / "ci.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_an_issue_form_has_what_a_form_needs(name: str) -> None:
    form = yaml.safe_load((FORGE / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["body"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    for field in fields:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes") and field["attributes"]["label"]
        assert all(isinstance(option, str) for option in field["attributes"].get("options", ["text"]))
