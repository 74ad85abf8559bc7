from __future__ import annotations

from pathlib import Path

import pytest

from dsc_serve.bench.compare.comparison import GROUPS, ComparisonError, included, load_comparison

WHOLE = """
title = "t"
subject = "a"
baseline = "b"
streams = [1, 2]
[[system]]
name = "a"
ffn = "dsc"
settings = { router_precision = "exact" }
[[system]]
name = "b"
form = "mixtral"
command = ["other", "{folder}", "{port}"]
[[expect]]
subject = "a"
against = "b"
figure = "median_itl_ms"
streams = 2
at_most = 0.9
"""


def test_the_comparisons_that_come_with_the_package_can_be_run() -> None:
    own = {
        "paper",
        "large-cpu",
        "quick",
        "vllm",
        "smollm2",
        "adapters",
        "mixture-olmoe",
        "mixture-granite",
        "mixture-qwen",
        "quantised-paper",
        "quantised-large",
    }
    assert own == set(included())
    for name in included():
        comparison = load_comparison(name)
        assert comparison.only((comparison.subject, comparison.baseline)).system
        assert comparison.rounds >= 5, name
    paper = {system.name: system for system in load_comparison("paper").system}
    assert set(paper) == {"dsc", "dsc int8", "moe", "molora", "dense"}
    assert paper["dsc"].settings != paper["dsc int8"].settings
    for name in GROUPS["mixture"]:
        routers = {system.settings.get("router_precision") for system in load_comparison(name).system}
        assert routers == {None, "exact"}, "as it is by itself, and exact"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "b"', 'name = "a"', "system names are a, a; each must be there once"),
        ('baseline = "b"', 'baseline = "c"', "baseline is 'c'; it must be one of a, b"),
        ("streams = 2", "streams = 3", r"expect\[0\].streams is 3; it must be one of \(1, 2\)"),
        ("at_most = 0.9", "", r"expect\[0\] needs one of at_most and at_least"),
        ('against = "b"', 'against = "x"', r"expect\[0\].against is 'x'; it must be one of a, b"),
        ('ffn = "dsc"', "", "system 'a' needs a folder, or one of ffn and form"),
        ('ffn = "dsc"', 'ffn = "rnn"', r"Invalid enum value 'rnn' - at `\$.system\[0\].ffn`"),
        ('ffn = "dsc"', 'form = "llama"', "system 'a' has a form but no command to serve it"),
        ('form = "mixtral"', 'form = "mixtral"\nsettings = { x = 1 }', "system 'b' has settings"),
        ("streams = [1, 2]", "streams = [0]", r">= 1 - at `\$.streams\[0\]`"),
        (
            "streams = [1, 2]",
            "streams = [1, 2]\nlimits = { itl = 5.0 }",
            "limits.itl is not known; it must be one of ttft, tpot, e2el",
        ),
        ("streams = [1, 2]", "stream = [1]", "unknown field `stream`"),
        ("[[expect]]", "[[expect", "is not TOML"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(WHOLE, encoding="utf-8")
    assert len(load_comparison(str(file)).system) == 2
    assert old in WHOLE
    file.write_text(WHOLE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ComparisonError, match=message):
        load_comparison(str(file))


def test_a_name_that_is_neither_a_file_nor_included_is_told_what_is() -> None:
    with pytest.raises(ComparisonError, match=r"'nothing' cannot be read.*large-cpu, mixture-gran.*, mixture"):
        load_comparison("nothing")
    with pytest.raises(ComparisonError, match="system 'gpt' is not in this comparison; it has dsc, moe, dense"):
        load_comparison("quick").only(("gpt",))
