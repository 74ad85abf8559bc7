"""docs/metrics.md, and the rules that metrics keep."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from dsc_serve.cli import main
from dsc_serve.server.metrics.document import document, families

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ALLOWED = {
    *("endpoint", "status", "finish_reason", "reason", "state", "part", "path", "order", "layer", "device", "le"),
    *("version", "dtype", "kernels", "policy", "form", "held_in", "source", "outcome", "adapter"),
}


def test_the_document_holds_what_the_command_prints() -> None:
    printed = CliRunner().invoke(main, ["metrics"]).output
    assert printed == document()
    assert printed in DOCUMENT.read_text()


def test_names_tell_base_units_and_meanings_stand_alone() -> None:
    names = [family.name for family in families()]
    assert len(set(names)) == len(names) > 45
    for family in families():
        assert not any(f"_{unit}" in family.name for unit in ("ms", "_us", "kb", "mb", "percent")), family.name
        assert family.documentation.endswith(".") and len(family.documentation) > 15, family.name
        assert {label for sample in family.samples for label in sample.labels} <= ALLOWED, family.name


def test_times_are_told_apart_from_half_a_millisecond_on() -> None:
    timed = [family for family in families() if family.type == "histogram" and family.name.endswith("_seconds")]
    assert len(timed) == 8
    for family in timed:
        edges = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
        assert min(edges) == 0.0005 and len([edge for edge in edges if edge <= 0.01]) >= 5, family.name
