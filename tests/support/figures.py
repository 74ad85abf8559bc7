"""Speeds, sizes and ratios in README.md and docs: each stands in a block that a command wrote, or in a list that says
why it does not. A block counts only where it is one of GENERATED_IN, which tests make again from the results beside it.

`python tests/support/figures.py` (`make results`) checks the documents and prints what is owed. With `--update` it
first brings the lists up to the documents: look at what that changed, and say why of each new entry.
"""

from __future__ import annotations

import re
import sys
import textwrap
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS = {kind: ROOT / "docs" / f"figures-{kind}.toml" for kind in ("owed", "given")}
BLOCK = re.compile(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", re.DOTALL)
GENERATED_IN = {  # by document, the blocks that commands write; a page of docs/results has one of its own name
    "README.md": {"summary"},
    "docs/benchmarks.md": {"answers"},
    "docs/adaptation.md": {"adaptation"},
}
SPAN = re.compile(r"`[^`\n]*`")
FENCE = "```"
TARGET = re.compile(r"\]\([^)]*\)|<!--.*?-->", re.DOTALL)
NUMBER = r"(?<![\w.,/-])[−+-]?\d+(?:,\d{3})*(?:\.\d+)?(?!\d)"
UNIT = (
    r"(?:ms|µs|ns|s|seconds?|minutes?|min|hours?|[kKMGT]i?B(?:/s)?|bytes|[GT]FLOP(?:/s)?|tokens/s|tokens per second|%|"
    r"percent|nats|times|× as|fold)"
)
WITH_UNIT = re.compile(rf"{NUMBER}(?:(?: ?(?:to|and|or|,|/|–|of|against) ?| ){NUMBER})*\s?{UNIT}(?![\w-])")
MEASURED_HEAD = re.compile(
    r"\b(?:ms|µs|ns|seconds|minutes|s to|[kKMGT]i?B|tokens/s|ratio|times|TFLOP|share|TTFT|ITL|rate|bits|loss)\b|%|\$"
)
IN_CELL = re.compile(rf"{NUMBER}(?:\s?{UNIT}(?![\w-])|(?![\w.]))")
RATIO = re.compile(r"(\w+[ -])?(?<![\w.,/-])(?:\d\.\d{2,3}(?![\d.]*\d)|0\.\d(?: to 0\.\d)?(?= (?:of|to) [a-z]))")
TIMES = r"(?:twice|(?:two|three|four|five|six|seven|eight|nine|ten) times)"
MULTIPLE = re.compile(rf"\b{TIMES}(?= (?:as|faster|slower|more|less)\b)")
ALIGNED = re.compile(rf"(?<=  )\s*({NUMBER})(?=\s|$)")  # a column of what a program printed
VERSIONED = ("python", "torch", "triton", "transformers", "version")  # what has versions, which look like ratios
TITLES = {
    "owed": "Figures of README.md and docs that no command has written yet: to be measured anew.",
    "given": "Figures of README.md and docs that are not measured: limits, rules, arithmetic, what others say.",
}
ANEW = "to be measured anew"
UNEXPLAINED = f"{ANEW}: written by hand, without a reason yet"


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


def generated_in(file: str) -> set[str]:
    """The names of blocks in a document, by its path from the root, that a command writes and a test makes again."""
    path = Path(file)
    return {path.stem} if path.parent == Path("docs/results") else GENERATED_IN.get(file, set())


def sections(text: str, generated: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """A document's headings with their lines, without blocks that are generated, code in a line, and targets of links.

    A heading is the first line of its own section.
    """
    heading, lines, fenced = "", list[str](), False
    plain = TARGET.sub("]", BLOCK.sub(lambda block: "" if block[1] in generated else block[0], text))
    for line in plain.splitlines():
        fence = line.lstrip().startswith(FENCE)
        fenced ^= fence
        if line.startswith("#") and not line.startswith("# ") and not fenced:
            yield heading, lines
            heading, lines = line.lstrip("#").strip(), [SPAN.sub("", line.lstrip("#"))]
        else:
            lines.append(line if fenced or fence else SPAN.sub("", line))
    yield heading, lines


def figures_of(lines: Sequence[str]) -> Iterator[str]:
    """Numbers with units in prose; every number in tables whose head, or line before, speaks of what is measured; of
    what a program printed those with units, and those that stand in columns."""
    prose, measured, head, fenced = list[str](), False, True, False
    for line in [*lines, ""]:
        fence = line.lstrip().startswith(FENCE)
        fenced ^= fence
        if fenced or fence:
            yield from (" ".join(found.group().split()) for found in WITH_UNIT.finditer(line))
            columns = ALIGNED.findall(WITH_UNIT.sub("", line))
            yield from columns if len(columns) > 1 else ()
            prose.append("")
        elif not line.lstrip().startswith("|"):
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
    rest = WITH_UNIT.sub("", text)
    yield from (found.group() for found in MULTIPLE.finditer(rest))
    for found in RATIO.finditer(rest):
        if (found[1] or "").strip(" -").lower() not in VERSIONED:
            yield found.group().removeprefix(found[1] or "")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def unaudited() -> list[Path]:
    """Pages of tables that were made of results which are not beside them."""
    pages = sorted((ROOT / "docs" / "results").glob("*.md"))
    return [page for page in pages if "\nNot auditable yet" in page.read_text(encoding="utf-8")]


def found_in(files: Sequence[Path], root: Path = ROOT) -> dict[Place, Counter[str]]:
    """Every figure that no command wrote, by place."""
    places: dict[Place, Counter[str]] = {}
    for file in files:
        name = str(file.relative_to(root))
        for heading, lines in sections(file.read_text(encoding="utf-8"), generated_in(name)):
            figures = Counter(figures_of(lines))
            if figures:
                place = Place(name, heading)
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
    told += [
        f"{entry.place.file}, {entry.place.heading}: no reason yet"
        for entry in exceptions
        if entry.reason == UNEXPLAINED
    ]
    return sorted(told)


def updated(found: Mapping[Place, Counter[str]], exceptions: Sequence[KnownFigures]) -> list[KnownFigures]:
    """What the documents still have of the lists; what is new stands apart and owed, though its place had an excuse."""
    left = {place: Counter(figures) for place, figures in found.items()}
    kept = []
    for entry in exceptions:
        own = left.get(entry.place, Counter[str]())
        figures = []
        for figure in entry.figures:
            if own[figure] > 0:
                own[figure] -= 1
                figures.append(figure)
        kept += [KnownFigures(entry.place, figures, entry.reason)] if figures else []
    kept += [KnownFigures(place, list(own.elements()), UNEXPLAINED) for place, own in left.items() if own.total()]
    return sorted(kept, key=lambda entry: entry.place)


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
    for page in unaudited():
        print(f"owed: {page.relative_to(ROOT)}: its results were not kept")
    print("\n".join(told) or "every other one comes from a generated block, or is listed with its reason")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
