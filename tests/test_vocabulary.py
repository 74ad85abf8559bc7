"""The code speaks the words of docs/glossary.md: the files that it names exist, and the words it replaced are gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
KERNELS = ROOT / "kernels" / "dsc_kernels"
SOURCES = sorted([*(ROOT / "dsc_serve").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
CLASSES = (
    "Terms", "Limits", "Tally", "Draft", "Edge", "Gate", "News", "Door", "Passage", "Away", "Arena", "AffinityRouter",
    "CompletionShape", "ChatShape", "TraceShape", "TermsFields", "Asked", "AskedEach",
)  # fmt: skip
FUNCTIONS = (
    "block_name", "root_name", "takes_likeliest", "likeliest", "kv_pools", "tally", "look_inside", "aside",
)  # fmt: skip
OF_A_REQUEST = ("known", "gap", "computed", "names", "root", "terms", "tallies")
# Words with a meaning of their own elsewhere, by the part of the package that has no such; but for these files.
OF_PARTS = {
    "engine": ("places", "settle", "settled", "longest", "group_name"),
    "model": ("longest", "settle"),
    "server": ("settle", "settled"),
}
EXCEPT = {
    ("places", "engine/pace.py"),  # of a launched step: its requests' slots among the tokens of the next
    ("places", "engine/runner.py"),
    ("places", "engine/step_result.py"),
    ("settled", "engine/constraints.py"),  # of what `PositionAhead` foresees
}
# The three backends have the same layers under the same names, as `backend.py`'s protocols call them.
PARALLEL = ("Ffn", "Moe", "Mlp", "Shared", "Linear", "Head", "Stack", "Screen")
BACKENDS = ("backend.py", "plain.py", "native", "gpu")
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
        elif isinstance(node, ast.arg):
            found.add(node.arg)
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


@pytest.mark.parametrize(("part", "gone"), [(part, gone) for part, words in OF_PARTS.items() for gone in words])
def test_a_word_has_one_meaning_in_its_part_of_the_package(part: str, gone: str) -> None:
    package = ROOT / "dsc_serve"
    files = {str(file.relative_to(package)) for file in (package / part).rglob("*.py") if gone in USED[file]}
    assert files == {file for word, file in EXCEPT if word == gone and file.startswith(f"{part}/")}


def block_hashes_called_names(text: str) -> list[str]:
    """Lines that call something a name, in a text that has to do with block hashes."""
    if not re.search(r"\bblock_hash|[Bb]lock hash|Prefix cache", text):
        return []
    hashed = re.sub(r"^(?!.*(block|hash|chain|digest|shared|request)).*$", "", text, flags=re.MULTILINE)
    return re.findall(r"^.*\b(?:names?|block_names?)\b.*$", hashed, re.MULTILINE)


@pytest.mark.parametrize("file", ["prefix", "request", "families", "kv_cache", "scheduler"])
def test_block_hashes_are_not_called_names(file: str) -> None:
    text = (ROOT / "dsc_serve" / "engine" / f"{file}.py").read_text(encoding="utf-8")
    assert "hash" in text and block_hashes_called_names(text) == []
    batching = (ROOT / "docs" / "batching.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Prefix cache\n.*?(?=^## )", batching, re.MULTILINE | re.DOTALL)
    assert block_hashes_called_names(section) == []


@pytest.mark.parametrize(
    "line",
    [
        "names = request.block_hashes[:4]",
        "def held(pool: Finder, name: bytes, group: int) -> int:  # a block",
        "names: list[bytes]  # of KV blocks, which are for these requests alone",
        "for name in reversed(shared.names):",
        "Full KV blocks have names: a keyed hash of their tokens and of the name before.",
        '"""Where the chain of names of all prompts with this salt begins."""',
    ],
)
def test_a_block_hash_that_is_called_a_name_is_found(line: str) -> None:
    assert block_hashes_called_names(f"block_hash = 1\n{line}\n") == [line]


def homes_of_classes(*files: Path) -> dict[str, list[str]]:
    homes: dict[str, list[str]] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    return {name: files for name, files in homes.items() if len(files) > 1}


def test_a_class_of_the_package_and_of_the_kernels_has_its_name_alone() -> None:
    """But for the layers that each backend of the kernels has."""
    shared = homes_of_classes(*sorted((ROOT / "dsc_serve").rglob("*.py")), *sorted(KERNELS.rglob("*.py")))
    assert {name: files for name, files in shared.items() if name not in PARALLEL} == {}
    assert shared.keys() == set(PARALLEL)
    where = {str(Path(file).relative_to("kernels/dsc_kernels").parts[0]) for files in shared.values() for file in files}
    assert where == set(BACKENDS)


USED = {file: identifiers(file) for file in SOURCES}
