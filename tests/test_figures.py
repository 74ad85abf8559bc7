"""No speed, size or ratio of README.md and docs/*.md comes from nowhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.figures import (
    ANEW,
    LISTS,
    KnownFigures,
    Place,
    documents,
    faults,
    figures_of,
    found_in,
    generated_in,
    read_lists,
    sections,
    updated,
    write_lists,
)


def test_every_figure_is_generated_or_listed_with_its_reason() -> None:
    assert faults(found_in(documents()), read_lists(list(LISTS.values()))) == []


def test_the_documents_that_are_looked_at_are_all_there_are() -> None:
    names = {file.name for file in documents()}
    assert {"README.md", "benchmarks.md", "batching.md", "kernels.md", "paper.md"} <= names and len(names) > 20


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("It takes 1.5 ms, or 2 to 3 µs, and 4,321 tokens/s.", ["1.5 ms", "2 to 3 µs", "4,321 tokens/s"]),
        ("1.22, 1.27 and 1.29 times as fast, by 12 %; 45%", ["1.22, 1.27 and 1.29 times", "12 %", "45%"]),
        ("medians are 1.12, 1.18 and 0.98; 448 MB of either", ["448 MB", "1.12", "1.18", "0.98"]),
        ("Python 3.11, torch 2.13, version 0.32.0, 127.0.0.1, 2026-11-22, K 4, d 1024, 35 M parameters", []),
        ("`--limit 5 ms` and\n```\nit took 5 ms\n```\n[a link](a-5 ms.md) <!-- 5 ms -->", ["5 ms"]),
        ("| model | ms a step |\n|---|---|\n| 8 | 1.5, 2 |\n| 16 | 3 |", ["1.5", "2", "3"]),
        ("| field | default |\n|---|---|\n| streams | 8 |", []),
        (
            "It takes 0.8 to 0.9 of its time, twice as long, by 0.012 nats, 0.985 in all",
            [
                "0.012 nats",
                "twice",
                "0.8 to 0.9",
                "0.985",
            ],
        ),
        (
            "```\nrouting      0.47%    47.0 µs per step\n   peak      16.5   1024\n```\nand 5 ms",
            [
                "0.47%",
                "47.0 µs",
                "16.5",
                "1024",
                "5 ms",
            ],
        ),
        ("```\na program  3\n```", []),
        ("## A heading of 5 ms\nand 6 ms", ["5 ms", "6 ms"]),
        ("Microseconds, ms:\n\n| B | ours |\n|---|---|\n| 8 | 72 |", ["72"]),
        ("A <!-- own: begin -->\n| a | ms |\n|---|---|\n| b | 7 |\n<!-- own: end --> 8 s", ["8 s"]),
    ],
)
def test_figures_are_seen(text: str, figures: list[str]) -> None:
    assert [figure for _, lines in sections(text, {"own"}) for figure in figures_of(lines)] == figures


def test_a_block_that_no_command_writes_hides_nothing() -> None:
    text = "A <!-- own: begin -->\n7 ms\n<!-- own: end -->"
    assert [list(figures_of(lines)) for _, lines in sections(text)] == [["7 ms"]]
    assert generated_in("README.md") == {"summary"} and generated_in("docs/kernels.md") == set()
    assert generated_in("docs/results/paper.md") == {"paper"}


def test_a_new_figure_and_one_that_has_gone_are_told_by_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\nfirst 5 ms\n\n## Speed\n\n6 ms, again 6 ms\n\n## Size\n\nnothing\n", encoding="utf-8")
    found = found_in([page], tmp_path)
    assert found == {Place("page.md", ""): Counter(["5 ms"]), Place("page.md", "Speed"): Counter({"6 ms": 2})}
    known = [
        KnownFigures(Place("page.md", "Speed"), ["6 ms"], "a reason"),
        KnownFigures(Place("page.md", ""), ["5 ms"], ""),
    ]
    assert faults(found, known) == ["page.md, Speed: '6 ms' comes from no generated block and is in no list"]
    known = [KnownFigures(Place("page.md", "Speed"), ["6 ms", "6 ms", "7 ms"], "a reason")]
    assert faults(found, known) == [
        "page.md, Speed: '7 ms' is in a list and not in the document",
        "page.md, its beginning: '5 ms' comes from no generated block and is in no list",
    ]


def test_lists_are_brought_up_to_the_documents_and_new_places_are_owed(tmp_path: Path) -> None:
    found = {Place("a.md", ""): Counter(["5 ms"] * 2 + ["6 to 7 ms"]), Place("b.md", "New"): Counter(["9 %"])}
    gone = KnownFigures(Place("gone.md", ""), ["1 s"], "x")
    after = updated(found, [KnownFigures(Place("a.md", ""), ["5 ms", "8 ms"], "a limit"), gone])
    assert [(one.place.file, one.figures, one.reason.startswith(ANEW)) for one in after] == [
        ("a.md", ["5 ms"], False),
        ("a.md", ["5 ms", "6 to 7 ms"], True),
        ("b.md", ["9 %"], True),
    ]
    lists = {kind: tmp_path / f"{kind}.toml" for kind in ("owed", "given")}
    write_lists(after, lists)
    assert "a limit" in lists["given"].read_text() and "b.md" in lists["owed"].read_text()
    assert faults(found, after) == ["a.md, : no reason yet", "b.md, New: no reason yet"], "which somebody has to write"


def test_what_is_owed_says_so_and_what_is_given_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owed, given = tmp_path / "owed.toml", tmp_path / "given.toml"
    monkeypatch.setitem(LISTS, "owed", owed)
    entry = '[[exception]]\nfile = "a.md"\nheading = ""\nreason = "{reason}"\nfigures = """\n1 ms | 2 to\n3 ms"""\n'
    owed.write_text(entry.format(reason=f"{ANEW}: an older engine"), encoding="utf-8")
    given.write_text(entry.format(reason="a limit of the code"), encoding="utf-8")
    assert [one.figures for one in read_lists([owed, given])] == [["1 ms", "2 to 3 ms"]] * 2
    given.write_text(entry.format(reason=""), encoding="utf-8")
    with pytest.raises(ValueError, match="has no reason"):
        read_lists([given])
    owed.write_text(entry.format(reason="because it is so"), encoding="utf-8")
    with pytest.raises(ValueError, match="a reason must begin with 'to be measured anew'"):
        read_lists([owed])
