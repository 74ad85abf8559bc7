"""Speeds, sizes and ratios in README.md and docs/*.md: each stands in a block that a command wrote, or in a list that
says why it does not.

`python tests/support/figures.py` (`make results`) checks the documents and prints what is owed. With `--update` it
first brings the lists up to the documents: look at what that changed, and say why of each new entry.
"""

from __future__ import annotations

import re
import sys
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS = {kind: ROOT / "docs" / f"figures-{kind}.toml" for kind in ("owed", "given")}
GENERATED = re.compile(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
TARGET = re.compile(r"\]\([^)]*\)|<!--.*?-->", re.DOTALL)
NUMBER = r"(?<![\w.,/-])[−+-]?\d+(?:,\d{3})*(?:\.\d+)?(?!\d)"
UNIT = (
    r"(?:ms|µs|ns|s|seconds?|minutes?|min|hours?|[kKMGT]i?B(?:/s)?|bytes|[GT]FLOP(?:/s)?|tokens/s|tokens per second|%|"
    r"percent|times|× as|fold)"
)
WITH_UNIT = re.compile(rf"{NUMBER}(?:(?: ?(?:to|and|or|,|/|–|of|against) ?| ){NUMBER})*\s?{UNIT}(?![\w-])")
MEASURED_HEAD = re.compile(
    r"\b(?:ms|µs|ns|seconds|minutes|s to|[kKMGT]i?B|tokens/s|ratio|times|TFLOP|share|TTFT|ITL|rate|bits|loss)\b|%|\$"
)
IN_CELL = re.compile(rf"{NUMBER}(?:\s?{UNIT}(?![\w-])|(?![\w.]))")
RATIO = re.compile(r"(\w+[ -])?(?<![\w.,/-])\d\.\d\d(?![\d.]*\d)")
VERSIONED = ("python", "torch", "triton", "transformers", "version")  # what has versions, which look like ratios
TITLES = {
    "owed": "Figures of README.md and docs/*.md that no command has written yet: to be measured anew.",
    "given": "Figures of README.md and docs/*.md that are not measured: limits, rules, arithmetic, what others say.",
}
ANEW = "to be measured anew"


@dataclass(frozen=True, order=True)
class Place:
    """Where figures stand: a document, by its path from the root, and a heading in it; "" before the first."""

    file: str
    heading: str


@dataclass(frozen=True)
class KnownFigures:
    """Figures of a place that need not be generated, and why."""

    place: Place
    figures: Sequence[str]
    reason: str


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """A document's headings with their lines, without what is generated, code, and targets of links."""
    heading, lines, fenced = "", list[str](), GENERATED.sub("", text)
    plain = TARGET.sub("]", CODE.sub("", fenced))
    for line in plain.splitlines():
        if line.startswith("#") and not line.startswith("# "):
            yield heading, lines
            heading, lines = line.lstrip("#").strip(), []
        else:
            lines.append(line)
    yield heading, lines


def figures_of(lines: Sequence[str]) -> Iterator[str]:
    """Numbers with units in prose; every number in tables whose head, or line before, speaks of what is measured."""
    prose, measured, head = list[str](), False, True
    for line in [*lines, ""]:
        if not line.lstrip().startswith("|"):
            prose.append(line)
            head = True
        elif head:
            said = next((one for one in reversed(prose) if one.strip()), "")
            before = said if said.rstrip().endswith(":") else ""
            measured, head = bool(MEASURED_HEAD.search(line + before)), False
        elif measured:
            for cell in line.strip().strip("|").split("|")[1:]:
                yield from (found.group().strip() for found in IN_CELL.finditer(cell))
        else:
            prose.append(line)
    text = "\n".join(prose)
    for found in WITH_UNIT.finditer(text):
        yield " ".join(found.group().split())
    for found in RATIO.finditer(WITH_UNIT.sub("", text)):
        if (found[1] or "").strip(" -").lower() not in VERSIONED:
            yield found.group().removeprefix(found[1] or "")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def found_in(files: Sequence[Path], root: Path = ROOT) -> dict[Place, Counter[str]]:
    """Every figure that no command wrote, by place."""
    places: dict[Place, Counter[str]] = {}
    for file in files:
        for heading, lines in sections(file.read_text(encoding="utf-8")):
            figures = Counter(figures_of(lines))
            if figures:
                place = Place(str(file.relative_to(root)), heading)
                places[place] = places.get(place, Counter()) + figures
    return places


def read_lists(lists: Sequence[Path]) -> list[KnownFigures]:
    """Raises ValueError where an entry lacks its reason, or what is owed does not say that it is."""
    found = []
    for file in lists:
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["exception"]:
            place, reason = Place(entry["file"], entry["heading"]), entry["reason"].strip()
            if len(reason) < 10:
                raise ValueError(f"{file.name}: {place} has no reason")
            if (file == LISTS["owed"]) != reason.startswith(ANEW):
                raise ValueError(
                    f"{file.name}: {place}: a reason must begin with {ANEW!r} where it is owed, only there"
                )
            figures = [figure.strip() for figure in entry["figures"].split("|") if figure.strip()]
            found.append(KnownFigures(place, [" ".join(figure.split()) for figure in figures], reason))
    return found


def faults(found: dict[Place, Counter[str]], exceptions: Sequence[KnownFigures]) -> list[str]:
    """Figures that are in no list, and entries of lists that are in no document."""
    listed: dict[Place, Counter[str]] = {}
    for entry in exceptions:
        listed[entry.place] = listed.get(entry.place, Counter()) + Counter(entry.figures)
    told = []
    for place in found.keys() | listed.keys():
        own, known = found.get(place, Counter()), listed.get(place, Counter())
        where = f"{place.file}, {place.heading or 'its beginning'}"
        told += [f"{where}: {figure!r} comes from no generated block and is in no list" for figure in own - known]
        told += [f"{where}: {figure!r} is in a list and not in the document" for figure in known - own]
    return sorted(told)


def updated(found: Mapping[Place, Counter[str]], exceptions: Sequence[KnownFigures]) -> list[KnownFigures]:
    """Every place once, with what its document has; a new one is owed."""
    reasons = {entry.place: entry.reason for entry in reversed(exceptions)}
    new = f"{ANEW}: written by hand, without a reason yet"
    order = [place for place in dict.fromkeys((*reasons, *found)) if place in found]
    return [KnownFigures(place, list(found[place].elements()), reasons.get(place, new)) for place in sorted(order)]


def write_lists(exceptions: Sequence[KnownFigures], lists: Mapping[str, Path]) -> None:
    for kind, file in lists.items():
        lines = [f"# {TITLES[kind]}", "# Each stands in its document as often as here; `make results` sees to it.", ""]
        for entry in exceptions:
            if (kind == "owed") == entry.reason.startswith(ANEW):
                joined = " | ".join(figure.replace(" ", "\0") for figure in entry.figures)
                wrapped = textwrap.fill(joined, 116, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
                lines += ["[[exception]]", f'file = "{entry.place.file}"', f'heading = "{entry.place.heading}"']
                lines += [f'reason = "{entry.reason}"', f'figures = """\n{wrapped}"""', ""]
        file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    if "--update" in sys.argv[1:]:
        write_lists(updated(found_in(documents()), read_lists(list(LISTS.values()))), LISTS)
    exceptions = read_lists(list(LISTS.values()))
    told = faults(found_in(documents()), exceptions)
    owed = [entry for entry in exceptions if entry.reason.startswith(ANEW)]
    for entry in owed:
        where = f"{entry.place.file}, {entry.place.heading or 'its beginning'}"
        print(f"owed: {where}: {len(entry.figures)} figures, {entry.reason}")
    print(f"{sum(len(entry.figures) for entry in owed)} figures are to be measured anew")
    print("\n".join(told) or "every other one comes from a generated block, or is listed with its reason")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
