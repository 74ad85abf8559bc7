from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.comparison import ComparisonError
from dsc_serve.bench.compare.elements import put_into
from dsc_serve.bench.compare.findings import checks, sentences, verdict
from dsc_serve.bench.compare.ratios import keep, machine_kind, moved, read_kept
from dsc_serve.bench.compare.report import elements, html_page, markdown
from dsc_serve.bench.compare.report_command import report_command
from dsc_serve.bench.compare.results import Contestant, Ratio, ResultRow, Results, load_results, save_results

COMPLETED = 40


def figures(itl: float, failed: int = 0) -> dict[str, Any]:
    times = {
        f"{of}_{name}_ms": itl * factor
        for name, factor in (("ttft", 5), ("itl", 1), ("tpot", 1), ("e2el", 60))
        for of in ("median", "p99")
    }
    return times | {
        "completed": COMPLETED,
        "failed": failed,
        "failures": {"timeout": failed} if failed else {},
        "duration": COMPLETED * itl / 100,
        "client_cpu": 0.1,
        "request_rate": 110 / itl,
        "request_throughput": 100 / itl,
        "request_goodput": 90 / itl,
        "output_throughput": 1000 / itl,
        "total_input_tokens": COMPLETED * 48,
        "total_output_tokens": COMPLETED * 64,
    }


def results(ours: dict[float, list[float]], failed: int = 0, expect: tuple[dict[str, Any], ...] = ()) -> Results:
    """`moe` takes 10 ms between tokens in every round; `dsc` what `ours` says by streams and round."""
    made = Results(
        title="A <title>",
        date="2026-01-02T03:04:05+00:00",
        client="dsc-serve bench compare own.toml",
        machine={"cpu": "a cpu", "instructions": "avx2", "threads": 2},
        comparison={
            "subject": "dsc",
            "baseline": "moe",
            "waves": 3,
            "rounds": 3,
            "prompt_tokens": 48,
            "output_tokens": 64,
            "prompt_file": "",
            "seed": 0,
            "limits": {"ttft": 50.0},
            "rate_seconds": 3.0,
            "expect": list(expect),
        },
    )
    step = {"milliseconds": {"ffn": 1.0, "step": 4.0}, "distinct": 3.5, "bytes": {"router": 8000.0, "head": 2000.0}}
    for name in ("dsc", "moe"):
        made.systems.append(Contestant(name=name, description={"ffn": name}, steps={"4": step}))
    for streams, rounds in ours.items():
        for number, itl in enumerate(rounds):
            for name, own in (("dsc", itl), ("moe", 10.0)):
                made.rows.append(
                    ResultRow(system=name, load="closed", value=streams, round=number, figures=figures(own, failed))
                )
                made.rows.append(ResultRow(system=name, load="open", value=0.5, round=number, figures=figures(own)))
    return made


@pytest.mark.parametrize(
    ("ratio", "more", "expected"),
    [
        (Ratio(0.85, 0.8, 0.9, 3), False, "better"),
        (Ratio(0.85, 0.8, 0.9, 3), True, "worse"),
        (Ratio(1.2, 1.1, 1.3, 3), True, "better"),
        (Ratio(1.2, 0.9, 1.3, 3), True, "even"),
        (Ratio(0.99, 0.98, 0.995, 3), False, "even"),
        (Ratio(0.5, 0.5, 0.5, 1), False, "unknown"),
    ],
)
def test_a_winner_is_named_only_where_all_rounds_agree(ratio: Ratio, more: bool, expected: str) -> None:
    assert verdict(ratio, more) == expected


def test_sentences_say_where_the_subject_wins_and_where_not() -> None:
    made = results({1: [11.0, 12.0, 11.0], 8: [8.0, 8.0, 8.5], 16: [9.0, 11.0, 10.0]})
    itl, *rest = sentences(made)
    assert itl == (
        "Median time between tokens, dsc against moe: dsc wins: -20% (rounds -20% to -15%) at 8 streams; "
        "moe wins: dsc is at +10% (rounds +10% to +20%) at 1 stream."
    )
    assert [text for text in rest if "difference" in text] == [
        "No difference that all rounds agree on, by streams: dsc against moe: median time between tokens at 16, "
        "tokens per second at 16, 99th percentile of the time to the first token at 16."
    ]
    assert "<td>-20% (-20% to -15%) *</td><td>no difference (-10% to +10%)</td>" in html_page(made), (
        "the table has both"
    )


def test_what_never_differs_is_said_once_and_nothing_where_all_differs() -> None:
    (even,) = (text for text in sentences(results({1: [10.0, 10.0], 8: [9.0, 11.0]})) if "against" in text)
    assert even.endswith("first token at all loads.") and even.count("No difference") == 1
    assert "difference" not in "".join(sentences(results({1: [5.0, 5.0]})))


def test_sentences_hide_no_failures_and_tell_goodput() -> None:
    text = "\n".join(sentences(results({1: [5.0, 5.0]}, failed=3)))
    assert "6 requests to moe failed: timeout." in text
    assert (
        "Within the limits at 0.5 times the baseline's peak: dsc 90% of its requests (rounds 90% to 90%), moe 90% of"
    ) in text


def changed(made: Results, system: str, load: str, number: int, **new: Any) -> None:
    for row in made.rows:
        if (row.system, row.load, row.round) == (system, load, number):
            row.figures |= new


def test_goodput_is_of_the_requests_that_were_offered_not_of_those_that_were_taken() -> None:
    made = results({1: [10.0]})
    refusals = {"failed": 3 * COMPLETED, "failures": {"HTTP 429": 3 * COMPLETED}}
    changed(made, "dsc", "open", 0, **refusals)
    assert "dsc 22% of its requests (rounds 22% to 22%), moe 90% of its requests" in "\n".join(sentences(made))
    assert "<td>11.0, 10.0, 9.00</td>" in html_page(made), "arrivals, completed, within the limits"


def test_a_closed_loop_that_lost_its_server_counts_in_no_figure() -> None:
    made = results({8: [8.0, 8.0, 8.0]})
    changed(made, "dsc", "closed", 1, median_itl_ms=0.1, completed=2, failed=22, failures={"disconnect": 22})
    assert made.median("dsc", "closed", 8, "median_itl_ms") == 8.0
    assert made.values("dsc", "closed", 8, "median_itl_ms").keys() == {0, 2}
    text = "\n".join(sentences(made))
    assert "22 requests to dsc failed: disconnect." in text
    assert "1 closed loop of dsc lost too many requests to count in any figure." in text


def test_what_makes_figures_unequal_is_said() -> None:
    made = results({8: [8.0, 8.0, 8.0]})
    assert not [text for text in sentences(made) if text.startswith(("dsc", "moe", "While"))]
    changed(made, "moe", "closed", 0, total_output_tokens=COMPLETED * 10, uncounted=2)
    made.rows = [row for row in made.rows if (row.system, row.round) != ("dsc", 2)]
    made.rows[0].others_cpu = 0.56
    found = sentences(made)
    assert "dsc was measured in 2 of 3 rounds." in found
    assert "moe had 46.0 output tokens a request, not 64." in found
    assert "moe does not always count its tokens; its events were counted instead." in found
    assert any(
        text.startswith("While dsc was measured, the systems that waited used up to 0.56 of a core") for text in found
    )


def test_percentiles_of_few_requests_and_agreement_of_few_rounds_are_named_as_such() -> None:
    made = results({1: [8.0, 8.0, 8.0], 8: [8.0, 8.0, 8.0]})
    for row in made.rows:
        if row.value == 8:
            row.figures["completed"] = 96
    assert "of 40 to 96 requests a round and so nearly that of the slowest, dsc against moe" in "\n".join(
        sentences(made)
    )
    assert "of two equal systems&#x27; rounds, 1 in 4 such sets agrees by chance" in html_page(made)
    for row in made.rows:
        row.figures["completed"] = 100
    assert "slowest" not in "\n".join(sentences(made))
    assert "Medians over 1 of 3 interleaved rounds" in html_page(results({1: [8.0]}))


def test_another_form_of_the_subject_is_compared_with_the_baseline_too() -> None:
    made = results({1: [8.0, 8.0]})
    systems = [{"name": name, "ffn": kind} for name, kind in (("dsc", "dsc"), ("dsc int8", "dsc"), ("moe", "moe"))]
    made.comparison["system"] = systems
    made.systems.append(Contestant(name="dsc int8"))
    for number in range(2):
        made.rows.append(ResultRow(system="dsc int8", load="closed", value=1, round=number, figures=figures(5.0)))
    assert (
        "Median time between tokens, dsc int8 against moe: dsc int8 wins: -50% (rounds -50% to -50%) at 1 stream."
    ) in sentences(made)


def test_a_loop_cut_short_and_a_busy_machine_are_said() -> None:
    made = results({8: [8.0, 8.0]})
    assert not [text for text in sentences(made) if "time limit" in text or "load average" in text]
    changed(made, "moe", "closed", 0, completed=20)
    made.machine["load_before"] = 1.5
    found = sentences(made)
    assert "1 closed loop of moe ended at the time limit, before all requests were sent." in found
    assert "In the minute before the run something else used the machine: load average 1.5." in found


def test_sampling_is_said_where_it_is_not_greedy() -> None:
    made = results({1: [8.0]})
    assert "greedy" in html_page(made)
    made.comparison["temperature"] = 0.8
    assert "drawn at temperature 0.8" in html_page(made)


def test_an_expectation_is_reached_by_all_rounds_or_by_the_median() -> None:
    base = {"subject": "dsc", "against": "moe", "figure": "median_itl_ms"}
    wanted = (
        {**base, "streams": 1, "at_most": 0.8},
        {**base, "streams": 1, "at_most": 0.7},
        {**base, "figure": "output_throughput", "streams": 1, "at_least": 1.3},
        {**base, "streams": 2, "at_most": 1.0},
    )
    made = results({1: [7.0, 7.5, 8.0]}, expect=wanted)
    assert [check.reached for check in checks(made)] == ["yes", "no", "by the median", "not measured"]
    page = html_page(made)
    assert "<td>0.75 (0.70 to 0.80)</td>" in page and ">not measured</td>" in page


def test_the_page_is_whole_and_escapes_what_it_shows() -> None:
    page = html_page(results({1: [5.0], 8: [6.0]}))
    assert "<title>A &lt;title&gt;</title>" in page and page.count("<svg") == 9
    assert page.count('<div class="charts">') == 2 and page.count("<table") == page.count("</table>")
    assert "<td>dsc</td><td>0.50</td><td>0.60</td>" in page, "the ratio of times between tokens"
    assert "2.0" in page and "0.5" in page, "kilobytes per token of 4 running requests"


def test_tables_go_between_the_marks_of_a_document(tmp_path: Path) -> None:
    folder, document = tmp_path / "run", tmp_path / "benchmarks.md"
    folder.mkdir()
    made = results({1: [5.0]})
    save_results(made, folder / "results.json")
    assert load_results(folder / "results.json") == made
    before = "# Title\n\n<!-- own: begin -->\nold\n<!-- own: end -->\n\nend\n"
    document.write_text(before, encoding="utf-8")
    options = ["--into", str(document), "--name", "own", "--chart", "throughput"]
    done = CliRunner().invoke(report_command, [str(folder), *options])
    assert done.exit_code == 0, done.output
    text = document.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- own: begin -->\n") and text.endswith("<!-- own: end -->\n\nend\n")
    assert "old" not in text and "| dsc | 200 |" in text and "![Throughput](plots/own-throughput.svg)" in text
    assert (tmp_path / "plots" / "own-throughput.svg").is_file() and "itl-p50" not in text
    assert load_results(tmp_path / "own.results.json") == made and "(own.results.json)" in text
    CliRunner().invoke(report_command, [str(folder), *options])
    assert document.read_text(encoding="utf-8") == text, "the same again"
    with pytest.raises(ComparisonError, match="the document has no place for other"):
        put_into(text, "other", markdown(made, "plots/other", ()))
    assert elements(made)


def test_only_what_moved_by_more_than_a_tenth_is_said(tmp_path: Path) -> None:
    file = tmp_path / "ratios.json"
    assert moved(results({1: [8.0]}), file) == [
        "machine kind: a cpu, avx2, 2 threads (a cpu)",
        f"{file} has no ratios of this kind, but of no kind; --keep-ratios adds them",
    ]
    keep(results({1: [8.0], 4: [8.0]}), file)
    wider = moved(results({1: [8.0], 4: [8.0], 8: [8.0]}), file)
    assert "not kept: dsc / moe, median_itl_ms, 8 streams: 0.80 now" in wider
    same = moved(results({1: [8.5], 4: [7.5]}), file)
    assert same[1:] == ["nothing moved by more than 10% since 2026-01-02 (4 ratios)"]
    lines = moved(results({1: [10.0]}), file)
    assert lines[1] == "moved by +25%: dsc / moe, median_itl_ms, 1 streams: 0.80 on 2026-01-02, 1.00 now"
    assert lines[2].startswith("moved by -20%: dsc / moe, output_throughput, 1 streams")
    assert "not measured now: dsc / moe, median_itl_ms, 4 streams" in lines
    other = results({1: [10.0]})
    other.machine = {"cpu": "another", "instructions": "", "threads": 8}
    keep(other, file)
    assert moved(results({1: [8.0], 4: [8.0]}), file)[1].startswith("nothing moved"), "kinds are kept apart"


def test_a_kind_of_machine_is_its_vendor_instructions_and_threads(tmp_path: Path) -> None:
    made = results({1: [8.0]})
    for cpu, kind in (("AMD EPYC 9R14", "AMD"), ("Intel(R) Xeon(R) Processor", "Intel"), ("a cpu", "a cpu")):
        made.machine["cpu"] = cpu
        assert machine_kind(made) == f"{kind}, avx2, 2 threads"
    kept = read_kept(Path(__file__).parents[2] / "docs" / "benchmark-ratios.json")
    made.machine |= {"cpu": "AMD EPYC", "instructions": "avx512_bf16"}
    assert kept[machine_kind(made)].ratios
