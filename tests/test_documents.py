"""README and docs against what they speak of: commands, options, make targets, build arguments, links, names."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from dsc_serve.cli import main
from dsc_serve.settings import SETTINGS

ROOT = Path(__file__).parents[1]
FIRST = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY", "examples/README")]
DOCUMENTS = [*FIRST, *sorted((ROOT / "docs").rglob("*.md"))]
NO_COMMANDS = ("dependencies.md", "api.md", "reliability.md", "index.md", "glossary.md", "security.md")
DEPLOYED = [file for file in (ROOT / "deploy").rglob("*") if file.suffix in (".yaml", ".yml", ".toml")]
MEASURED = re.compile(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", re.DOTALL)
CODE = re.compile(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", re.DOTALL)
COMMAND = re.compile(r"(?<![\w/:.'-])dsc-serve(?: [^\n`#|;&)\\]*(?:\\\n[^\n`#|;&)\\]*)*|$)")

everywhere = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def text_of(file: Path) -> str:
    """Without what programs write into it."""
    return MEASURED.sub("", file.read_text(encoding="utf-8"))


def code_of(file: Path) -> Iterator[str]:
    for block, span in CODE.findall(text_of(file)):
        yield block or span


def commands(text: str) -> Iterator[list[str]]:
    for found in COMMAND.findall(text):
        try:
            yield shlex.split(found.replace("\\\n", " "))[1:]
        except ValueError:  # prose with an apostrophe
            yield found.split()[1:]


def complaints(words: list[str]) -> Iterator[str]:
    """What the program would say to a command's name, its options and those values that are one of a few."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        inner = command.get_command(click.Context(command), name)
        if inner is None:
            yield f"{command.name} has no command {name}"
            return
        command = inner
    options = {flag: p for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
    options |= dict.fromkeys(("-h", "--help"), click.Option(["--help"], is_flag=True))
    for word, after in itertools.pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        option = options.get(flag)
        if option is None:
            yield f"{command.name} has no option {flag}"
        elif isinstance(option.type, click.Choice) and (value if equals else after) not in (*option.type.choices, "…"):
            yield f"{command.name} {flag} does not take {value or after}"


@everywhere
def test_every_command_of_a_document_exists_with_its_options(file: Path) -> None:
    found = [words for code in code_of(file) for words in commands(code)]
    assert [text for words in found for text in complaints(words)] == []
    assert found or file.name in NO_COMMANDS


def test_commands_that_do_not_exist_are_seen() -> None:
    text = "`dsc-serve bench serv x` dsc-serve serve DIR --prot 1 \\\n  --kernels native\ndsc-serve init --ffn=rnn"
    said = [line for words in commands(text) for line in complaints(words)]
    assert said == ["bench has no command serv", "serve has no option --prot", "init --ffn does not take rnn"]


@everywhere
def test_every_make_target_of_a_document_exists(file: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for code in code_of(file) for name in re.findall(r"(?:^|\s)make ([a-z-]+)", code)}
    assert named <= targets


def test_every_build_argument_is_one_of_the_dockerfile() -> None:
    known = set(re.findall(r"^ARG ([A-Z_]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for file in (*DOCUMENTS, *DEPLOYED, ROOT / "Dockerfile"):
        assert set(re.findall(r"--build-arg[ =]'?([A-Z_]+)", file.read_text(encoding="utf-8"))) <= known, file.name


def anchors(file: Path) -> set[str]:
    """Of a document's headings, as a forge makes them."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@everywhere
def test_every_link_of_a_document_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(file)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = (file.parent / path).resolve() if path else file
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_operators_guide_names_settings_metrics_and_alerts_that_exist() -> None:
    guide = text_of(ROOT / "docs" / "operations.md")
    metrics = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE))
    alerts = set(re.findall(r"alert: (\w+)", (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()))
    known = metrics | alerts | SETTINGS.keys()
    named = {name for name in re.findall(r"`([a-z]+_[a-z_]+|DscServe\w+)[`{]", guide) if name not in known}
    assert named <= {"engine_down", "shutting_down", "engine_error", "stop_grace_period"}, "error codes, and compose's"


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert len(re.findall(r" (?:length|stop)$", capsys.readouterr().out, re.MULTILINE)) == 2
    (logits,) = names["logits"]
    assert len(logits) == 3


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {package for listed in project["optional-dependencies"].values() for package in listed}
    explained = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    for package in (*project["dependencies"], *extras):
        name = re.split(r"[<>=;\[ ]", package)[0]
        assert re.search(rf"\b{name}\b", explained), package
