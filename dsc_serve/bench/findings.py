"""What a comparison's figures say, in sentences computed from them: where the subject wins, by how much, where not."""

from __future__ import annotations

from dsc_serve.bench.comparison import Expectation
from dsc_serve.bench.results import Ratio, Results

EVEN = 0.02  # a median this close to 1 is no difference, and so is one whose rounds lie on both sides of 1

FIGURES = {  # name, and whether more is better
    "median_itl_ms": ("median time between tokens", False),
    "median_tpot_ms": ("median time per output token", False),
    "median_ttft_ms": ("median time to the first token", False),
    "p99_ttft_ms": ("99th percentile of the time to the first token", False),
    "output_throughput": ("tokens per second", True),
    "request_goodput": ("goodput", True),
}
COMPARED = ("median_itl_ms", "output_throughput", "p99_ttft_ms")


def verdict(ratio: Ratio, more_is_better: bool) -> str:
    """ "better", "worse" or "even": told apart only where all rounds agree."""
    if abs(ratio.median - 1) <= EVEN or ratio.low < 1 < ratio.high:
        return "even"
    return "better" if (ratio.median > 1) == more_is_better else "worse"


def percent(ratio: Ratio) -> str:
    """How far the ratio is from 1, with the least and the largest of its rounds."""
    return f"{ratio.median - 1:+.0%} (rounds {ratio.low - 1:+.0%} to {ratio.high - 1:+.0%})"


def streams_text(value: float) -> str:
    return f"{value:g} stream{'' if value == 1 else 's'}"


def sentences(results: Results) -> list[str]:
    """The subject against the baseline, then against every other system."""
    subject, baseline = str(results.comparison["subject"]), str(results.comparison["baseline"])
    measured = results.measured()
    if subject not in measured:
        return [f"{subject} was not measured, so nothing can be said of it."]
    others = [name for name in (baseline, *measured) if name in measured and name != subject]
    found = []
    for other in dict.fromkeys(others):
        for figure in COMPARED if other == baseline else COMPARED[:2]:
            found.append(one_sentence(results, subject, other, figure))
    found += goodput_sentences(results, subject, baseline)
    found += failures(results)
    return [text for text in found if text]


def one_sentence(results: Results, subject: str, other: str, figure: str) -> str:
    name, more = FIGURES[figure]
    groups: dict[str, list[str]] = {"better": [], "even": [], "worse": []}
    for value in results.points("closed"):
        ratio = results.ratio(subject, other, "closed", value, figure)
        if ratio is not None:
            groups[verdict(ratio, more)].append(f"{percent(ratio)} at {streams_text(value)}")
    if not any(groups.values()):
        return ""
    parts = []
    if groups["better"]:
        parts.append(f"{subject} wins: {', '.join(groups['better'])}")
    if groups["worse"]:
        parts.append(f"{other} wins: {subject} is at {', '.join(groups['worse'])}")
    if groups["even"]:
        parts.append(f"no difference that all rounds agree on: {', '.join(groups['even'])}")
    return f"{name[0].upper()}{name[1:]}, {subject} against {other}: {'; '.join(parts)}."


def goodput_sentences(results: Results, subject: str, baseline: str) -> list[str]:
    """What share of the offered requests kept the limits, at each open load."""
    found = []
    for value in results.points("open"):
        parts = []
        for name in dict.fromkeys((subject, baseline)):
            good, rate = (
                results.median(name, "open", value, figure) for figure in ("request_goodput", "request_throughput")
            )
            if good is not None and rate:
                parts.append(f"{name} {good:.1f} of {rate:.1f} requests per second")
        if parts:
            found.append(f"Within the limits at {value:g} times the baseline's peak: {', '.join(parts)}.")
    return found


def failures(results: Results) -> list[str]:
    """Requests that failed are said, never left out silently."""
    found = []
    for name in results.measured():
        failed = sum(row.figures["failed"] for row in results.rows if row.system == name)
        if failed:
            reasons = {reason for row in results.rows if row.system == name for reason in row.figures["failures"]}
            found.append(f"{failed} requests to {name} failed: {', '.join(sorted(reasons))}.")
    return found


class Check:
    """One expectation and what was measured."""

    def __init__(self, expected: Expectation, ratio: Ratio | None) -> None:
        self.expected, self.ratio = expected, ratio

    @property
    def met(self) -> bool | None:
        """None where it was not measured."""
        if self.ratio is None:
            return None
        if self.expected.at_most is not None:
            return self.ratio.median <= self.expected.at_most
        assert self.expected.at_least is not None
        return self.ratio.median >= self.expected.at_least

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
