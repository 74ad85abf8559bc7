"""What a stranger reads first: that it is short, shows what it says, and names only what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_documents import DOCUMENTS, ROOT, text_of

from dsc_serve import __version__

README = (ROOT / "README.md").read_text(encoding="utf-8")
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # of changes, in the changelog
RESULTS = ROOT / "docs" / "results"
PLACES = (ROOT, ROOT / "dsc_serve", ROOT / "kernels" / "dsc_kernels", ROOT / "tests")
OUTPUTS = {"models", "build", "runs"}
FOLDERS = {folder.name for place in PLACES for folder in place.iterdir() if folder.is_dir()} - OUTPUTS
MADE = {"deploy/compose/models"}  # by who installs it


def missing(document: Path) -> Iterator[str]:
    """Paths that a document names as `folder/…` and that are not in the repository."""
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text_of(document)):
        there = any((place / path).exists() for place in (*PLACES, document.parent))
        if path.split("/")[0] in FOLDERS and path not in MADE and not there:
            yield path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_path_and_example_of_a_document_exists(document: Path) -> None:
    assert list(missing(document)) == []
    for example in re.findall(r"\bexamples/\w+\.\w+", text_of(document)):
        assert (ROOT / example).is_file(), example


def test_paths_that_do_not_exist_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`engine/policies`, `engine/nothing.py`, `docs/no.md`, `runs/paper`", encoding="utf-8")
    assert list(missing(page)) == ["engine/nothing.py", "docs/no.md"]


def test_the_readme_is_short_and_its_first_screen_answers_what_whether_and_how() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:40])
    assert "git clone" in screen and "in another terminal" in screen and "minutes" in screen
    assert "\n| here | there |" in screen and "**Use it if**" in screen and "**Use something else if**" in screen
    (block,) = re.findall(r"^```\n(.*?)^```", screen, re.MULTILINE | re.DOTALL)
    shown = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    assert len(shown) == 3
    assert all(len(command.strip().splitlines()) >= 2 for command in shown), "each with what it prints"


def test_the_tree_of_the_readme_is_that_of_the_repository() -> None:
    (tree,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    place = ROOT
    named = set()
    for indent, folder in re.findall(r"^( *)([\w./]+)/ ", tree, re.MULTILINE):
        place = ROOT if not indent else ROOT / "dsc_serve"
        assert (place / folder).is_dir(), folder
        named.add(folder)
    packages = {file.parent.name for file in (ROOT / "dsc_serve").glob("*/__init__.py")}
    assert packages <= named, "every floor is in it"


def test_the_figures_of_the_readme_stand_on_the_pages_it_links() -> None:
    """Those that stand there by hand; what a command put there `bench/test_result_pages.py` makes again."""
    by_hand, row = (
        text_of(ROOT / "README.md"),
        r"^\| .* \| (.*?) \| (.*?) \| \[(.*?)\]\(docs/results/([\w-]+)\.md\) \|$",
    )
    rows = re.findall(row, by_hand, re.MULTILINE)
    assert len(re.findall(row, README, re.MULTILINE)) >= 4
    for here, there, ratios, name in rows:
        page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
        cells = [f"| {cells.replace(', ', '~').replace('~', ' | ')} |" for cells in (here, there)]
        assert all(row in page for row in cells), name
        for ratio in re.findall(r"\d\.\d\d", ratios):
            percent = f"{float(ratio) - 1:+.0%}"
            assert f" {ratio} " in page or percent in page, (name, ratio)


def test_the_readme_names_its_machine_and_what_cannot_be_audited_yet() -> None:
    table = README[README.index("Tokens per second at") : README.index("## Limits")]
    assert "llama.cpp" in table and ("EPYC" in table or "Xeon" in table)
    unaudited = [name for name in re.findall(r"docs/results/([\w-]+)\.md", table) if not raw(name).exists()]
    assert ("auditable yet" in table) == bool(unaudited)


def raw(name: str) -> Path:
    return RESULTS / f"{name}.results.json"


def test_the_benchmarks_begin_with_ten_lines_that_answer_the_question() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    before = text[: text.index("\n| ")]
    assert re.findall(r"^(\d+)\. ", before, re.MULTILINE) == [str(number) for number in range(1, 11)]
    assert "![" not in text and text.count("\n| ") < 30, "measured tables stand in docs/results"


def test_no_difference_is_said_once_in_the_sentences_of_a_page_of_results() -> None:
    for page in RESULTS.glob("*.md"):
        found = page.read_text(encoding="utf-8").partition("### What was found")[2].partition("\n### ")[0]
        items = [line for line in found.lower().splitlines() if line.startswith("- ")]
        assert sum(line.count("no difference") for line in items) <= 1, page.name


def test_every_page_is_reached_from_the_readme_and_each_reader_gets_three() -> None:
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in seen:
            seen.add(page)
            text = page.read_text(encoding="utf-8")
            ahead += [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s:]+\.md)[)#]", text)]
            ahead += [file for path in re.findall(r"\bdocs/[\w/-]+\.md", text) if (file := ROOT / path).exists()]
    assert {page for page in DOCUMENTS if page not in seen} == set()
    rows = re.findall(r"^\| (use|operate|change) it \|(.*)", (ROOT / "docs/index.md").read_text("utf-8"), re.MULTILINE)
    assert [(reader, cells.count("](")) for reader, cells in rows] == [("use", 3), ("operate", 3), ("change", 3)]


def test_the_index_of_the_documentation_has_every_page() -> None:
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(linked) == pages and len(linked) == len(pages), "each once"


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    assert any(version.startswith(f"[{__version__}]") for version in versions[1:])
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert kinds == [
            kind for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security") if kind in kinds
        ]
        assert len(re.split(r"^### .*\n\n- ", part, flags=re.MULTILINE)) == len(kinds) + 1, "a list under each"


def test_the_forge_runs_the_same_command_as_everyone() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"^\s*- run: (.*)$", workflow, re.MULTILINE) == [".ci/run"]
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for file in (ROOT / ".github").rglob("*"):
        assert file.is_dir() or "://" not in file.read_text(encoding="utf-8"), f"{file.name} names a host"


def test_contributors_are_told_of_every_target() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(targets) > 12 and {name for name in targets if f"`make {name}`" not in text} == set()


def test_contributors_are_told_what_a_target_begins_with() -> None:
    """A target that makes others is listed with those that do more than prepare."""
    rows = dict(
        re.findall(r"^\| `make ([a-z-]+)` \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    )
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("test", "test-full"):
        (others,) = re.findall(rf"^{name}: (.*?) *##", makefile, re.MULTILINE)
        assert [other for other in others.split() if other in ("lint", "sanitize") and other not in rows[name]] == []
