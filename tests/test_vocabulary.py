"""The code speaks the words of docs/glossary.md: the files that it names exist, and the words it replaced are gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
SOURCES = sorted([*(ROOT / "dsc_serve").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
CLASSES = (
    "Terms", "Limits", "Tally", "Draft", "Edge", "Gate", "News", "Door", "Passage", "Away", "Arena", "AffinityRouter",
    "CompletionShape", "ChatShape", "TraceShape", "TermsFields",
)  # fmt: skip
FUNCTIONS = (
    "block_name", "root_name", "takes_likeliest", "likeliest", "kv_pools", "tally", "look_inside", "aside",
)  # fmt: skip
OF_A_REQUEST = ("known", "gap", "computed", "names", "root", "terms", "tallies")
OF_KERNELS = ("Laps", "Asked", "Reading", "Nominees", "Nomination", "Gathered", "prepared", "SMALL", "CHUNK", "RUNS")
MODULES = (
    "terms.py", "engine/tally.py", "engine/policies/draft.py", "server/edge.py", "server/description.py",
    "scale/door.py", "scale/affinity.py", "scale/routing.py", "bench/inside.py", "bench/compare/blocks.py",
)  # fmt: skip


def identifiers(file: Path) -> set[str]:
    """Every name that a file defines, uses or asks for as an attribute, and `request.name` as such."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
            if isinstance(node.value, ast.Name):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {name.name for name in node.names}
    return found


def rows() -> list[tuple[str, str]]:
    """Word and file of each row of the glossary's tables."""
    cells = [line.strip("|").split("|") for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if "|" in line]
    return [(row[0].strip(), row[-1].strip().strip("`")) for row in cells if "/" in row[-1]]


def test_every_file_that_the_glossary_names_is_there() -> None:
    named = [file for _, file in rows()]
    assert len(named) > 50
    assert [file for file in named if not (ROOT / file).is_file()] == []


def test_every_name_of_ours_in_the_glossary_is_in_its_file() -> None:
    unknown = []
    for word, file in rows():
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", word):
            if not re.search(rf"\b{name}\b", text):
                unknown.append((name, file))
    assert unknown == []


@pytest.mark.parametrize("gone", CLASSES)
def test_classes_that_were_renamed_are_gone(gone: str) -> None:
    """From the package: tests name other libraries' classes."""
    assert [str(f.relative_to(ROOT)) for f in SOURCES if gone in USED[f] and "tests" not in f.parts] == []


@pytest.mark.parametrize("gone", [*FUNCTIONS, *(f"request.{name}" for name in OF_A_REQUEST)])
def test_words_that_were_replaced_are_gone(gone: str) -> None:
    assert [str(file.relative_to(ROOT)) for file in SOURCES if gone in USED[file]] == []


@pytest.mark.parametrize("gone", OF_KERNELS)
def test_words_of_the_kernels_that_were_replaced_are_gone(gone: str) -> None:
    files = [*(ROOT / "kernels").rglob("*.h"), *(ROOT / "kernels").rglob("*.cpp")]
    assert len(files) > 20
    assert [file.name for file in files if re.search(rf"\b{gone}\b", file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_were_renamed_are_gone(module: str) -> None:
    assert not (ROOT / "dsc_serve" / module).exists()


def test_a_class_of_the_package_has_its_name_alone() -> None:
    """But for the schemas of openapi.json, whose names clients see."""
    homes: dict[str, list[str]] = {}
    for file in sorted((ROOT / "dsc_serve").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and file.name != "answers.py":
                homes.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


USED = {file: identifiers(file) for file in SOURCES}
