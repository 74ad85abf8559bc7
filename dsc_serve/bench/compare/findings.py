"""What a comparison's figures say, in sentences computed from them: where the subject wins, by how much, where not."""

from __future__ import annotations

import statistics

from dsc_serve.bench.compare.comparison import LEAST_REQUESTS, Expectation
from dsc_serve.bench.compare.results import Ratio, ResultRow, Results
from dsc_serve.bench.load.summary import FEW
from dsc_serve.bench.machine import IDLE_LOAD

EVEN = 0.02  # a median this close to 1 is no difference, and so is one whose rounds lie on both sides of 1

IDLE = 0.1  # cores, more than which systems that wait should not use
P99 = "p99_ttft_ms"
FIGURES = {  # name, and whether more is better
    "median_itl_ms": ("median time between tokens", False),
    "median_tpot_ms": ("median time per output token", False),
    "median_ttft_ms": ("median time to the first token", False),
    P99: ("99th percentile of the time to the first token", False),
    "output_throughput": ("tokens per second", True),
    "request_goodput": ("goodput", True),
}
WORK = {"total_output_tokens": "output_tokens", "total_input_tokens": "prompt_tokens"}  # and what was asked for
COMPARED = ("median_itl_ms", "output_throughput", P99)


def verdict(ratio: Ratio, more_is_better: bool) -> str:
    """ "better", "worse", "even" or "unknown": told apart only where all of several rounds agree."""
    if ratio.rounds < 2:
        return "unknown"
    if abs(ratio.median - 1) <= EVEN or ratio.low < 1 < ratio.high:
        return "even"
    return "better" if (ratio.median > 1) == more_is_better else "worse"


def percent(ratio: Ratio) -> str:
    """How far the ratio is from 1, with the least and the largest of its rounds."""
    return f"{ratio.median - 1:+.0%} (rounds {ratio.low - 1:+.0%} to {ratio.high - 1:+.0%})"


def counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def answer(results: Results) -> list[str]:
    """The comparison's question in three sentences: tokens per second, times, and what these are worth."""
    subject, baseline = str(results.comparison["subject"]), str(results.comparison["baseline"])
    measured = results.measured()
    if missing := [name for name in dict.fromkeys((subject, baseline)) if name not in measured]:
        return [f"{' and '.join(missing)} had no load, so that {subject} and {baseline} cannot be compared."]
    parts = [f"{FIGURES[one][0]} is {by_streams(results, subject, baseline, one)}" for one in ("median_itl_ms", P99)]
    machine = f"{results.machine.get('cpu', 'an unknown processor')}, {results.machine.get('threads', '?')} threads"
    how = "Measured in one round, which cannot tell a difference from chance"
    if results.rounds > 1:
        rounds = counted(results.rounds, "round")
        how = f"Medians of {rounds}, told as a difference only where all rounds agree and the median is 2 % from 1"
    rates = by_streams(results, subject, baseline, "output_throughput")
    return [
        f"{subject} beside {baseline}, tokens per second: {rates}.",
        f"Its {'; its '.join(parts)}.",
        f"{how} ({machine}; the most tokens per second: {most_tokens(results)}).",
    ]


def by_streams(results: Results, subject: str, baseline: str, figure: str) -> str:
    """Where the subject has more or less and where neither, with the medians of the ratios."""
    groups: dict[str, list[tuple[float, Ratio]]] = {"better": [], "worse": [], "unknown": [], "even": []}
    for value in results.points("closed"):
        ratio = results.ratio(subject, baseline, "closed", value, figure)
        if ratio is not None:
            groups[verdict(ratio, FIGURES[figure][1])].append((value, ratio))
    better, worse = ("more", "fewer") if FIGURES[figure][1] else ("shorter", "longer")
    words = {"better": better, "worse": worse, "unknown": "by a single round", "even": "no difference"}
    told = []
    for which, own in groups.items():
        if own:
            times = f" ({', '.join(f'{ratio.median:.2f}' for _, ratio in own)} times)" if which != "even" else ""
            streams = [f"{value:g}" for value, _ in own]
            told.append(f"{words[which]} at {listed(streams)} stream{'' if streams == ['1'] else 's'}{times}")
    return "; ".join(told) or "not measured"


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def most_tokens(results: Results) -> str:
    """Which system had the most tokens per second at the most streams."""
    streams = max(results.points("closed"), default=0.0)
    rates = {name: results.median(name, "closed", streams, "output_throughput") or 0.0 for name in results.measured()}
    best = max(rates, key=lambda name: rates[name])
    return f"{best}, {rates[best]:,.0f} at {counted(streams, 'stream')}"


def sentences(results: Results) -> list[str]:
    """The subject against the baseline, then against every other system; other forms of it against the baseline."""
    subject, baseline = str(results.comparison["subject"]), str(results.comparison["baseline"])
    measured = results.measured()
    if subject not in measured:
        return [f"{subject} was not measured, so nothing can be said of it."]
    found = [one_sentence(results, *pair) for pair in compared(results)]
    found.append(even_sentence(results))
    found += goodput_sentences(results, subject, baseline)
    found += [text for name in measured for text in reservations(results, name)]
    load = results.machine.get("load_before")
    if load is not None and load > IDLE_LOAD:
        found.append(f"In the minute before the run something else used the machine: load average {load:g}.")
    return [text for text in found if text]


def compared(results: Results) -> list[tuple[str, str, str]]:
    """Whom, with whom, and by which figure: what `sentences` tells, in its order."""
    subject, baseline = str(results.comparison["subject"]), str(results.comparison["baseline"])
    measured = results.measured()
    others = dict.fromkeys(name for name in (baseline, *measured) if name in measured and name != subject)
    found = [(subject, other, one) for other in others for one in (COMPARED if other == baseline else COMPARED[:2])]
    forms = other_forms(results, subject, baseline) if baseline in measured else []
    return found + [(form, baseline, one) for form in forms for one in COMPARED[:2]]


def other_forms(results: Results, subject: str, baseline: str) -> list[str]:
    """Measured systems with the subject's kind of FFN, such as the same model with another router."""
    kinds = {system["name"]: system.get("ffn") for system in results.comparison.get("system", ())}
    own = kinds.get(subject)
    return [name for name in results.measured() if own and kinds.get(name) == own and name not in (subject, baseline)]


def one_sentence(results: Results, subject: str, other: str, figure: str) -> str:
    """Where one of the two wins, or where one round alone was measured; nothing where there is no difference."""
    more = FIGURES[figure][1]
    groups: dict[str, list[str]] = {"better": [], "even": [], "worse": [], "unknown": []}
    for value in results.points("closed"):
        ratio = results.ratio(subject, other, "closed", value, figure)
        if ratio is not None:
            groups[verdict(ratio, more)].append(f"{percent(ratio)} at {counted(value, 'stream')}")
    parts = []
    if groups["better"]:
        parts.append(f"{subject} wins: {', '.join(groups['better'])}")
    if groups["worse"]:
        parts.append(f"{other} wins: {subject} is at {', '.join(groups['worse'])}")
    if groups["unknown"]:
        parts.append(f"by a single round, which tells nothing apart: {', '.join(groups['unknown'])}")
    if not parts:
        return ""
    name = named(results, subject, figure)
    return f"{name[0].upper()}{name[1:]}, {subject} against {other}: {'; '.join(parts)}."


def named(results: Results, subject: str, figure: str) -> str:
    """A figure in words, with how little stands behind it."""
    name = FIGURES[figure][0]
    if figure == P99 and (of := few_requests(results, subject)):
        name += f", of {of} requests a round and so nearly that of the slowest"
    return name


def even_sentence(results: Results) -> str:
    """All that is no difference, said once; `ratio_rows` has its figures."""
    groups: dict[str, list[str]] = {}
    for subject, other, figure in compared(results):
        more = FIGURES[figure][1]
        ratios = {value: results.ratio(subject, other, "closed", value, figure) for value in results.points("closed")}
        even = [f"{value:g}" for value, ratio in ratios.items() if ratio and verdict(ratio, more) == "even"]
        if even:
            where = "at all loads" if len(even) == len(ratios) else f"at {', '.join(even)}"
            groups.setdefault(f"{subject} against {other}", []).append(f"{FIGURES[figure][0]} {where}")
    if not groups:
        return ""
    listed = "; ".join(f"{pair}: {', '.join(figures)}" for pair, figures in groups.items())
    return f"No difference that all rounds agree on, by streams: {listed}."


def ratio_rows(results: Results) -> list[list[str]]:
    """Every ratio that `sentences` speaks of: who to whom, the figure, and its median and rounds by streams."""
    rows = []
    for subject, other, figure in compared(results):
        cells = []
        for value in results.points("closed"):
            ratio = results.ratio(subject, other, "closed", value, figure)
            cells.append("" if ratio is None else marked(ratio, FIGURES[figure][1]))
        rows.append([f"{results.label(subject)} / {results.label(other)}", FIGURES[figure][0], *cells])
    return rows


def marked(ratio: Ratio, more_is_better: bool) -> str:
    """How far from 1, with a star where all rounds agree; a median that its rounds do not bear out is not told."""
    which = verdict(ratio, more_is_better)
    if which == "even":
        return f"no difference ({ratio.low - 1:+.0%} to {ratio.high - 1:+.0%})"
    return percent(ratio).replace("rounds ", "") + (" *" if which != "unknown" else "")


def few_requests(results: Results, system: str) -> str:
    """How many requests the rounds of the closed loops had, where some had fewer than a 99th percentile asks for."""
    counts = [results.median(system, "closed", value, "completed") for value in results.points("closed")]
    known = [round(count) for count in counts if count is not None]
    if not known or min(known) >= FEW:
        return ""
    return f"{min(known)} to {max(known)}" if min(known) < max(known) else f"{known[0]}"


def goodput_sentences(results: Results, subject: str, baseline: str) -> list[str]:
    """What share of the offered requests kept the limits, at each open load."""
    found = []
    for value in results.points("open"):
        parts = []
        for name in dict.fromkeys((subject, baseline)):
            kept = [share for row in results.of(name, "open", value) if (share := row.kept) is not None]
            if kept:
                rounds = f"{min(kept):.0%} to {max(kept):.0%}"
                parts.append(f"{name} {statistics.median(kept):.0%} of its requests (rounds {rounds})")
        if parts:
            found.append(f"Within the limits at {value:g} times the baseline's peak: {', '.join(parts)}.")
    return found


def reservations(results: Results, name: str) -> list[str]:
    """What one must know of a system's figures before one compares them; none of it is left out silently."""
    rows = [row for row in results.rows if row.system == name]
    closed = [row for row in rows if row.load == "closed"]
    found = []
    if failed := sum(row.figures["failed"] for row in rows):
        reasons = {reason for row in rows for reason in row.figures["failures"]}
        found.append(f"{counted(failed, 'request')} to {name} failed: {', '.join(sorted(reasons))}.")
    if lost := sum(not row.counts for row in rows):
        found.append(f"{counted(lost, 'closed loop')} of {name} lost too many requests to count in any figure.")
    if cut := sum(row.figures["completed"] + row.figures["failed"] < asked_for(results, row) for row in closed):
        found.append(f"{counted(cut, 'closed loop')} of {name} ended at the time limit, before all requests were sent.")
    if (rounds := len({row.round for row in rows})) < results.rounds:
        found.append(f"{name} was measured in {rounds} of {results.rounds} rounds.")
    if any(row.figures.get("uncounted") for row in rows):
        found.append(f"{name} does not always count its tokens; its events were counted instead.")
    found += [unequal_work(results, name, total, asked) for total, asked in WORK.items()]
    waiting = max((row.others_cpu for row in closed), default=0.0)
    if waiting > IDLE:
        found.append(
            f"While {name} was measured, the systems that waited used up to {waiting:.2f} of a core; with --alone "
            "none waits."
        )
    return found


def asked_for(results: Results, row: ResultRow) -> float:
    """Requests of a closed loop in one round."""
    return max(float(LEAST_REQUESTS), row.value * float(results.comparison["waves"]))


def unequal_work(results: Results, name: str, total: str, asked: str) -> str:
    """Says so where a system's requests were of other lengths than those that were asked for."""
    rows = [row for row in results.rows if row.system == name and row.load == "closed" and row.figures.get(total)]
    requests, wanted = sum(row.figures["completed"] for row in rows), int(results.comparison[asked])
    if not requests:
        return ""
    mean = sum(row.figures[total] for row in rows) / requests
    kind = asked.replace("_", " ")
    return f"{name} had {mean:.1f} {kind} a request, not {wanted}." if abs(mean / wanted - 1) > EVEN else ""


class Check:
    """One expectation and what was measured."""

    def __init__(self, expected: Expectation, ratio: Ratio | None) -> None:
        self.expected, self.ratio = expected, ratio

    @property
    def reached(self) -> str:
        """ "yes" where every round reaches it, "by the median" where only that does, "no", or "not measured"."""
        if self.ratio is None:
            return "not measured"
        if self._reaches(self.ratio.median):
            every = self._reaches(self.ratio.low) and self._reaches(self.ratio.high)
            return "yes" if every else "by the median"
        return "no"

    def _reaches(self, value: float) -> bool:
        if self.expected.at_most is not None:
            return value <= self.expected.at_most
        assert self.expected.at_least is not None
        return value >= self.expected.at_least

    @property
    def demand(self) -> str:
        wanted = self.expected
        return f"at most {wanted.at_most:g}" if wanted.at_most is not None else f"at least {wanted.at_least:g}"


def checks(results: Results) -> list[Check]:
    """The comparison's expectations."""
    found = []
    for content in results.comparison.get("expect", ()):
        expected = Expectation(**content)
        ratio = results.ratio(expected.subject, expected.against, "closed", expected.streams, expected.figure)
        found.append(Check(expected, ratio))
    return found
