"""What a field is stands beside the field, in a comment, and not in the prose above the fields."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ("dsc_serve", "kernels/dsc_kernels", "tests/support")
BASES = {"Struct", "BaseModel", "Strict", "NamedTuple"}  # of msgspec, pydantic and typing


def last_name(node: ast.expr) -> str:
    """`Struct` of `msgspec.Struct`, `dataclass` of `dataclass(frozen=True)`."""
    if isinstance(node, ast.Call | ast.Subscript):
        return last_name(node.func if isinstance(node, ast.Call) else node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def classes(source: str) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))


def records(sources: Mapping[str, str]) -> list[tuple[str, ast.ClassDef]]:
    """The classes that are made of fields, with the file of each: also those that derive from another such class."""
    found = [(file, node) for file, source in sources.items() for node in classes(source)]
    names = set(BASES)
    while more := {node.name for _, node in found if names & set(map(last_name, node.bases))} - names:
        names |= more
    return [
        (file, node) for file, node in found if node.name in names or "dataclass" in map(last_name, node.decorator_list)
    ]


def fields_of(node: ast.ClassDef) -> dict[str, int]:
    """The names of its fields, with the last line of each."""
    found = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    return {one.target.id: one.end_lineno or 0 for one in found if isinstance(one.target, ast.Name)}


@functools.cache
def blocks_of_comments(source: str) -> list[tuple[int, str]]:
    """Comments that have lines of their own, neighbouring lines as one text; each with its last line's number."""
    blocks: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            line, text = token.start[0], token.string.lstrip("# ")
            if blocks and blocks[-1][0] == line - 1:
                text = f"{blocks.pop()[1]}\n{text}"
            blocks.append((line, text))
    return blocks


def explained_in_prose(sources: Mapping[str, str]) -> list[str]:
    """Each class whose docstring, or a comment between its fields, says `field: what it is` of fields of its own."""
    found = []
    for file, node in records(sources):
        fields = fields_of(node)
        if not fields:
            continue
        name, last = rf"`?(?:{'|'.join(fields)})`?", max(fields.values())
        explains = re.compile(rf"(?:^|[.;]\s+|\n\s*)({name}(?:(?:,| and|, and)\s+{name})*):\s")
        between = [text for line, text in blocks_of_comments(sources[file]) if node.lineno <= line <= last]
        for text in (ast.get_docstring(node) or "", *between):
            found += [f"{file}: {node.name}: {match}" for match in explains.findall(text)]
    return found


def sources() -> dict[str, str]:
    """The texts of all files, by their paths."""
    files = (file for root in ROOTS for file in (ROOT / root).rglob("*.py"))
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in sorted(files)}


def test_no_docstring_explains_fields() -> None:
    assert list(explained_in_prose(sources())) == []


def test_there_are_classes_of_fields_everywhere() -> None:
    """So that what is looked through is not another folder's."""
    files = [file for file, node in records(sources()) if fields_of(node)]
    assert all(sum(file.startswith(root) for file in files) > 5 for root in ROOTS)


HEADS = (
    "@dataclass\nclass Row:",
    "@dataclasses.dataclass(frozen=True)\nclass Row:",
    "class Row(msgspec.Struct, frozen=True):",
    "class Row(Struct):",
    "class Row(BaseModel):",
    "class Row(Strict):",
    "class Row(NamedTuple):",
    "class Base(msgspec.Struct):\n    pass\nclass Middle(Base):\n    pass\nclass Row(Middle):",
)
BAD = (
    ('"""width: of it."""', "width"),
    ('"""A row. width: of it, in bytes."""', "width"),
    ('"""A row; height: of it."""', "height"),
    ('"""A row.\n\n    width, height: in bytes.\n    """', "width, height"),
    ('"""A row. width and height: in bytes."""', "width and height"),
    ('"""A row.\n\n    `width`: in bytes.\n    """', "`width`"),
    ("# width: in bytes. height: too", "width"),
    ("# Both in bytes.\n    # height: of it", "height"),
)
GOOD = (
    '"""A row."""',
    '"""A row: its width and height."""',
    '"""A row. other: not a field."""',
    '"""A row, whose width: it has one."""',
    "# In bytes.",
)
FIELDS = "\n    width: int  # of it: in bytes\n    height: int = 0  # width: more than this\n"


@pytest.mark.parametrize("head", HEADS)
def test_a_class_of_fields_is_found(head: str) -> None:
    source = f"{head}\n    {BAD[1][0]}\n{FIELDS}"
    assert explained_in_prose({"row.py": source}) == ["row.py: Row: width"]


@pytest.mark.parametrize(("text", "field"), BAD)
def test_prose_that_explains_a_field_is_found(text: str, field: str) -> None:
    found = explained_in_prose({"row.py": f"{HEADS[0]}\n    {text}\n{FIELDS}"})
    assert found[0] == f"row.py: Row: {field}"


@pytest.mark.parametrize("text", GOOD)
def test_other_prose_is_none(text: str) -> None:
    assert explained_in_prose({"row.py": f"{HEADS[0]}\n    {text}\n{FIELDS}"}) == []


def test_arguments_of_an_ordinary_class_may_stand_in_its_docstring() -> None:
    source = f"class Row:\n    {BAD[1][0]}\n{FIELDS}"
    assert explained_in_prose({"row.py": source}) == []
