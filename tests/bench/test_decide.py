"""`bench decide`: the law is found again in steps that follow one, and what it says of sizes is what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from dsc_serve.bench.compare.results import Contestant, ResultRow, Results, save_results
from dsc_serve.bench.decide import measuring
from dsc_serve.bench.decide.answers import ClosedLoad, expect, expect_all, tokens_a_step
from dsc_serve.bench.decide.checked import checked_figures, served_as
from dsc_serve.bench.decide.cost_law import fit, fit_errors, held_out_errors, nonnegative
from dsc_serve.bench.decide.decide_page import load_decision, measured_page
from dsc_serve.bench.decide.measured_machine import MeasuredMachine, MeasuredStep, load_machine, save_machine
from dsc_serve.bench.decide.measuring import STEPS, AskedMachine, measure_machine, missing_models
from dsc_serve.bench.decide.sizes import MEASURED_SIZES, DecideError, ModelFrame, frame_for, parameters
from dsc_serve.bench.decide.step_terms import OWN, SHARED, SYSTEMS, ServedForm, StepShape, step_terms
from dsc_serve.cli import main
from dsc_serve.model.initial import PRESETS

MACHINE = {"cpu": "a cpu", "cores": 2, "instructions": "avx2", "threads": 2}
LARGE = ModelFrame(400e6, 250e6, 24, 1024, 50304, 256)
TRUE = {
    "step": 0.2,
    "requests": 0.03,
    "frame GB": 25.0,
    "frame GFLOP": 1.5,
    "context GB": 50.0,
    "pairs": 3.0,
    **{f"{system} {name}": value for system in SYSTEMS for name, value in zip(OWN, (0.02, 30.0, 2.0), strict=True)},
    "moe layers": 0.09,
    "moe GB": 45.0,
    "dense GFLOP": 4.0,
}


def form(system: str, weights: str = "stored") -> ServedForm:
    return ServedForm(weights, 2, int8_router=system == "dsc", int8_head=True)


def synthetic(noise: float = 0.0, weights: tuple[str, ...] = ("stored",)) -> MeasuredMachine:
    """Steps that follow TRUE, each off by a factor that is drawn."""
    rng = np.random.default_rng(0)
    measured = MeasuredMachine(date="2026-01-02", machine=MACHINE, sizes=dict(MEASURED_SIZES))
    for name, frame in MEASURED_SIZES.items():
        for held in weights:
            for system, kind in SYSTEMS.items():
                config = frame.config(kind.ffn)
                for step in STEPS:
                    terms = step_terms(system, config, form(system, held), step)
                    ms = sum(TRUE[term] * value for term, value in terms.items()) * np.exp(noise * rng.normal())
                    row = MeasuredStep(size=name, system=system, form=form(system, held), step=step, ms=float(ms))
                    measured.steps.append(row)
    return measured


def test_the_least_squares_are_never_below_zero_and_the_best_of_those() -> None:
    rng = np.random.default_rng(1)
    a = rng.random((40, 6))
    truth = np.array([2.0, 0.0, 1.0, 0.0, 3.0, 0.5])
    assert nonnegative(a, a @ truth) == pytest.approx(truth, abs=1e-9)
    b = a @ np.array([2.0, -1.0, 1.0, 0.0, 3.0, 0.5])
    x = nonnegative(a, b)
    gradient = a.T @ (b - a @ x)
    assert (x >= 0).all() and x[1] == 0
    assert gradient[x > 0] == pytest.approx(0, abs=1e-8) and (gradient <= 1e-8).all()


def test_a_law_is_found_again_at_a_size_that_was_not_measured() -> None:
    measured = synthetic()
    law = fit(measured, "stored")
    for system, error in fit_errors(measured, "stored", law).items():
        assert error.largest < 1e-6, system
    assert max(error.largest for error in held_out_errors(measured, "stored").values()) < 0.05
    for system, kind in SYSTEMS.items():
        for step in (StepShape(singles=24, context=100), StepShape(singles=3, context=64, drafts=4, chunk=128)):
            terms = step_terms(system, LARGE.config(kind.ffn), form(system), step)
            true = sum(TRUE[name] * value for name, value in terms.items())
            assert law.ms(system, LARGE, step) == pytest.approx(true, rel=1e-4), (system, step)


def test_noise_of_five_percent_moves_what_is_expected_by_no_more_than_that() -> None:
    measured = synthetic(noise=0.05)
    law = fit(measured, "stored")
    assert all(cost >= 0 for cost in law.costs.values())
    for system, kind in SYSTEMS.items():
        step = StepShape(singles=8, context=80)
        terms = step_terms(system, LARGE.config(kind.ffn), form(system), step)
        true = sum(TRUE[name] * value for name, value in terms.items())
        assert law.ms(system, LARGE, step) == pytest.approx(true, rel=0.05), system
    assert {error.count for error in fit_errors(measured, "stored", law).values()} == {4 * len(STEPS)}


def test_steps_that_something_else_disturbed_are_not_followed() -> None:
    measured = synthetic(noise=0.01)
    rng = np.random.default_rng(2)
    disturbed = [msgspec.structs.replace(row, ms=row.ms * (4 if rng.random() < 0.1 else 1)) for row in measured.steps]
    measured = msgspec.structs.replace(measured, steps=disturbed)
    law, step = fit(measured, "stored"), StepShape(singles=8, context=80)
    for system, kind in SYSTEMS.items():
        terms = step_terms(system, LARGE.config(kind.ffn), form(system), step)
        true = sum(TRUE[name] * value for name, value in terms.items())
        assert law.ms(system, LARGE, step) == pytest.approx(true, rel=0.08), system


def test_terms_are_those_of_the_paper_s_layers() -> None:
    """At one token: all of the router and the static part, K atoms, twice; by hand at the paper's sizes."""
    frame = MEASURED_SIZES["paper"]
    config, step = frame.config("dsc"), StepShape(singles=1, context=50)
    c, d, layers = config.ffn, 384, 6
    assert c.kind == "dsc"
    exact = step_terms("dsc", config, ServedForm("stored", 2), step)
    assert set(exact) == {*SHARED, *(f"dsc {name}" for name in OWN)}
    rows = c.num_atoms + 2 * c.static_size + 2 * c.atoms_per_token
    assert exact["dsc GB"] == pytest.approx(layers * rows * d * 2 / 1e9)
    assert exact["frame GB"] == pytest.approx((layers * 4 * d * d + 50304 * d) * 2 / 1e9)
    int8 = step_terms("dsc", config, ServedForm("stored", 2, int8_router=True, int8_head=True), step)
    rows = c.num_atoms / 2 + 2 * c.static_size + 3 * c.atoms_per_token
    assert int8["dsc GB"] == pytest.approx(layers * rows * d * 2 / 1e9)
    assert exact["frame GB"] - int8["frame GB"] == pytest.approx(50304 * d / 1e9)
    four = step_terms("moe", frame.config("moe"), ServedForm("int4", 2), step)["moe GB"]
    two = step_terms("moe", frame.config("moe"), ServedForm("stored", 2), step)["moe GB"]
    assert four / two == pytest.approx(20 / 32 / 2)


@pytest.mark.parametrize("system", SYSTEMS)
def test_more_work_never_takes_less_time(system: str) -> None:
    law = fit(synthetic(noise=0.1), "stored")

    def ms(frame: ModelFrame = LARGE, **shape: Any) -> float:
        return law.ms(system, frame, StepShape(**({"singles": 8, "context": 80} | shape)))

    for name, values in (
        ("singles", range(1, 65)),
        ("context", range(0, 4000, 100)),
        ("drafts", range(8)),
        ("chunk", range(0, 512, 32)),
    ):
        times = [ms(**{name: value}) for value in values]
        assert times == sorted(times), name
    assert ms(MEASURED_SIZES["small"]) < ms(MEASURED_SIZES["paper"]) < ms(MEASURED_SIZES["middle"]) < ms()
    load = ClosedLoad(streams=tuple(range(1, 65)))
    own = [expect(law, system, "stored", LARGE, load, streams, False) for streams in load.streams]
    assert [one.tokens_per_s for one in own] == sorted(one.tokens_per_s for one in own)
    assert [one.end for one in own] == sorted(one.end for one in own)


def test_speculation_is_what_acceptance_makes_it() -> None:
    law, load = fit(synthetic(), "stored"), ClosedLoad(streams=(1, 8))
    assert tokens_a_step(0.5, 2) == 1.75 and tokens_a_step(1.0, 7) == 8 and tokens_a_step(0.0, 7) == 1

    def at(acceptance: float) -> Any:
        own = msgspec.structs.replace(load, acceptance=acceptance)
        return expect(law, "dsc", "stored", LARGE, own, 1, True)

    without = expect(law, "dsc", "stored", LARGE, load, 1, False)
    assert at(0.0) == msgspec.structs.replace(without, speculation=True), "wrong drafts are not made"
    rates = [at(acceptance / 10).tokens_per_s for acceptance in range(11)]
    assert rates == sorted(rates) and rates[-1] > 2 * rates[0]
    whole = at(1.0)
    step = StepShape(singles=1, context=load.context, drafts=whole.drafts)
    assert whole.token == pytest.approx(law.ms("dsc", LARGE, step) / (whole.drafts + 1)) and whole.drafts > 0


def test_a_request_s_time_is_its_prompt_its_tokens_and_the_prompts_of_the_others() -> None:
    law, load = fit(synthetic(), "stored"), ClosedLoad(streams=(4,), prompt_tokens=100, output_tokens=11)
    (one,) = (e for e in expect_all({"stored": law}, LARGE, load) if e.system == "moe" and not e.speculation)

    def ms(**shape: int) -> float:
        return law.ms("moe", LARGE, StepShape(context=105.5, **shape))

    first = ms(singles=3, chunk=100)
    end = first + 10 * ms(singles=4) + 3 * (first - ms(singles=3))
    assert (one.first, one.token, one.end) == pytest.approx((first, ms(singles=4), end))
    assert one.tokens_per_s == pytest.approx(1e3 * 4 * 11 / end)


def test_numbers_of_parameters_and_frames() -> None:
    assert [parameters("--params", text) for text in ("400M", "1.2b", "35000000", " 500k ")] == [4e8, 1.2e9, 3.5e7, 5e5]
    for preset in PRESETS.values():
        budget = preset.budget
        frame = frame_for(budget.total, budget.active, None, None, 50304, 256)
        assert (frame.layers, frame.width) == (budget.layers, budget.width)
    frames = [frame_for(1.4 * active, active, None, None, 50304, 256) for active in (5e7, 1e8, 4e8, 2e9)]
    assert [frame.width for frame in frames] == sorted({frame.width for frame in frames})
    assert frame_for(4e8, 2.5e8, 12, 1024, 50304, 256).layers == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--params", "400X"], "--params is '400X'; it must be a number of parameters from 100K to 1000B"),
        (["--params", "40"], "--params is '40'"),
        (["--active", "500M"], "--params is 4e+08, less than --active, 5e+08; it must be at least as many"),
        (["--active", "20M"], "--active is 2e+07 of 4e+08 parameters with a vocabulary of 50,304"),
        (["--layers", "8"], "--layers and --width must be given together"),
        (["--layers", "8", "--width", "100"], "--width is 100; it must be a multiple of 64"),
        (["--layers", "40", "--width", "2048"], "no such model: active is 2.5e+08 parameters; the network without"),
        (["--minutes", "3"], "--minutes is of --measure alone"),
        (["--streams", "0"], "--streams is 0; it must be at least 1"),
        (["--measure", "x.json"], "--params cannot be used with --measure"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_by_name(
    tmp_path: Path, options: list[str], message: str
) -> None:
    file = tmp_path / "machine.json"
    save_machine(synthetic(), file)
    asked = {"--params": "400M", "--active": "250M", "--machine": str(file)}
    asked |= dict(zip(options[::2], options[1::2], strict=True))
    done = CliRunner().invoke(main, ["bench", "decide", *(word for pair in asked.items() for word in pair)])
    assert done.exit_code == 1 and done.output.startswith(f"Error: {message}"), done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not a measured machine"),
        ('{"date": "", "machine": {}, "sizes": {}}', "has no steps"),
        (
            '{"date": "", "machine": {}, "sizes": {}, "steps": [{"size": "x", "system": "rnn", "ms": 1, "step": {}, '
            '"form": {"weights": "stored", "element": 2}}]}',
            "system 'rnn' is not known; it must be one of dsc, dsc exact, moe, molora, dense",
        ),
        (
            '{"date": "", "machine": {}, "sizes": {}, "steps": [{"size": "x", "system": "moe", "ms": 0, "step": {}, '
            '"form": {"weights": "stored", "element": 2}}]}',
            "Expected `float` > 0.0 - at `$.steps[0].ms`",
        ),
    ],
)
def test_a_file_that_is_no_measured_machine_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "machine.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    command = ["bench", "decide", "--params", "400M", "--active", "250M", "--machine", str(file)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and message in done.output and len(done.output.splitlines()) == 1, done.output


def comparison(machine: dict[str, Any], factor: float) -> Results:
    """A run at the paper's sizes that took `factor` times what TRUE says, of everything."""
    systems = [
        {"name": "dsc", "ffn": "dsc", "settings": {"router_precision": "exact"}},
        {"name": "moe", "ffn": "moe"},
        {"name": "other", "ffn": None, "form": "mixtral", "command": ["vllm"]},
    ]
    asked = {"preset": "paper", "prompt_tokens": 48, "output_tokens": 64, "baseline": "moe", "system": systems}
    made = Results(title="", date="", client="", machine=machine, comparison=asked)
    law, load, budget = fit(synthetic(), "stored"), ClosedLoad(), PRESETS["paper"].budget
    frame = ModelFrame(budget.total, budget.active, budget.layers, budget.width, budget.vocab_size, budget.context)
    for name, system in (("dsc", "dsc exact"), ("moe", "moe"), ("other", "moe")):
        made.systems.append(Contestant(name=name))
        rate = expect(law, system, "stored", frame, load, 8, False).tokens_per_s / factor
        figures = {"output_throughput": rate, "failed": 0, "completed": 9}
        made.rows.append(ResultRow(system=name, load="closed", value=8, round=0, figures=figures))
    return made


def test_the_law_is_held_against_comparisons_of_servers(tmp_path: Path) -> None:
    save_results(comparison(MACHINE, 1.25), tmp_path / "own.results.json")
    save_results(comparison(MACHINE | {"cpu": "another"}, 3.0), tmp_path / "other.results.json")
    (tmp_path / "forward.results.json").write_text("[]", encoding="utf-8")
    figures, passed_over = checked_figures(tmp_path, {"stored": fit(synthetic(), "stored")}, MACHINE)
    assert [(one.source, one.system, one.same_machine) for one in figures] == [
        (source, system, source == "own") for source in ("other", "own") for system in ("dsc", "moe")
    ]
    assert [one.error for one in figures] == pytest.approx([2.0, 2.0, 0.25, 0.25])
    assert [one.ratio_error for one in figures if one.system == "dsc"] == pytest.approx([0, 0], abs=1e-9)
    assert passed_over == ["forward.results.json: not a comparison's results"]
    assert served_as({"ffn": "dsc", "settings": {"speculation": "auto"}}) is None
    assert served_as({"ffn": "moe", "settings": {"weights": "int4"}}) == ("moe", "int4")


def test_the_command_answers_with_tables_a_chart_and_errors(tmp_path: Path) -> None:
    file, document = tmp_path / "machine.json", tmp_path / "page.md"
    save_machine(synthetic(0.02, ("stored", "int8")), file)
    save_results(comparison(MACHINE, 1.25), tmp_path / "own.results.json")
    document.write_text("# A page\n\n<!-- decide: begin -->\n<!-- decide: end -->\n", encoding="utf-8")
    command = ["bench", "decide", "--params", "400M", "--active", "250M", "--machine", str(file)]
    command += ["--streams", "8,1", "--acceptance", "0.5", "--results", str(tmp_path)]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out"), "--into", str(document)])
    assert done.exit_code == 0, done.output
    for text in (
        "400 M parameters, 250 M active: what to serve (a model's figures, not measured)",
        "Models of 24 layers, d 1024, vocabulary 50,304",
        "drafts are right with a chance of 0.5 each",
        "| system | 1 stream | 8 streams |",
        "Tokens per second to moe's, bfloat16, a model's",
        "Tokens per second, int8 (drafts a step), a model's",
        f"| bfloat16 | dsc exact | {4 * len(STEPS)} |",
        "tokens per second on this kind of machine: median",
        "The largest model that was measured has 200 M parameters: all here lies beyond.",
    ):
        assert text in done.output, text
    cells = [
        cell
        for line in done.output.splitlines()
        if line.startswith("| dsc, speculation")
        for cell in line.split("|")[2:-1]
    ]
    assert len(cells) == 2 * 3 * 2 and all(cell.strip().startswith("≈") for cell in cells)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("<svg") < page.index("<table") and page.count("<svg") == 1
    assert "moe bfloat16 (baseline)" in page and "tokens per second, expected" in page
    written = document.read_text(encoding="utf-8")
    assert "plots/decide-decide.svg" in written and (tmp_path / "plots" / "decide-decide.svg").is_file()
    assert measured_page(load_decision(tmp_path / "decide.results.json")).text in written


def test_without_a_machine_the_one_that_the_documents_keep_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    question = ["bench", "decide", "--params", "100M", "--active", "70M"]
    done = CliRunner().invoke(main, question)
    assert done.exit_code == 1
    assert done.output == (
        "Error: --machine is missing, and there is no docs/results/decide.results.json: measure this machine first "
        "with `dsc-serve bench decide --measure FILE`, then give --machine FILE\n"
    )
    told = " ".join(CliRunner().invoke(main, ["bench", "decide", "--help"]).output.split())
    assert "--measure wrote. Needed where no" in told and "decide.results.json" not in told
    page = tmp_path / "docs" / "results" / "decide.md"
    page.parent.mkdir(parents=True)
    save_machine(synthetic(), tmp_path / "machine.json")
    first = CliRunner().invoke(main, [*question, "--machine", "machine.json", "--into", str(page)])
    assert first.exit_code == 0, first.output
    assert CliRunner().invoke(main, question).output == first.output


TINY = {
    "one": ModelFrame(160e3, 125e3, 2, 64, 256, 512),
    "two": ModelFrame(320e3, 240e3, 2, 64, 512, 512),
}
FEW = (StepShape(singles=1, context=8), StepShape(singles=3, context=8), StepShape(singles=2, context=8, chunk=9))


def test_a_machine_is_measured_goes_on_where_it_was_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TIMED", 2)
    out, lines = tmp_path / "machine.json", list[str]()
    first = AskedMachine(sizes={"one": TINY["one"]}, weights=("stored", "int8"), steps=FEW, rounds=2, threads=1)
    measured, whole = measure_machine(first, out, lines.append)
    assert whole and lines == ["one, stored: dsc, dsc exact, moe, molora, dense", "one, int8: dsc, moe, molora, dense"]
    assert len(measured.steps) == (5 + 4) * len(FEW) and measured.machine["threads"] == 1
    exact = {row.form.int8_router for row in measured.steps if row.system == "dsc exact"}
    assert exact == {False}
    assert all(0 < row.ms < 1e3 for row in measured.steps)
    lines.clear()
    both = AskedMachine(sizes=TINY, weights=("stored",), steps=FEW, rounds=2, threads=1)
    again, whole = measure_machine(both, out, lines.append)
    assert whole and lines == ["two, stored: dsc, dsc exact, moe, molora, dense"]
    assert again.steps[: len(measured.steps)] == measured.steps
    assert list(missing_models(both, load_machine(out))) == []
    command = ["bench", "decide", "--params", "300K", "--active", "220K", "--machine", str(out), "--vocab", "300"]
    done = CliRunner().invoke(main, [*command, "--layers", "2", "--width", "64", "--results", str(tmp_path)])
    assert done.exit_code == 0 and "No comparison's results were there" in done.output, done.output
    with pytest.raises(DecideError, match="its threads is 1, and here 2; measure into another file"):
        measure_machine(msgspec.structs.replace(both, threads=2), out)
    changed = {"two": ModelFrame(330e3, 240e3, 2, 64, 512, 512)}
    with pytest.raises(DecideError, match="has size 'two' as"):
        measure_machine(msgspec.structs.replace(both, sizes=changed), out)


def test_what_is_measured_can_be_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MEASURED_SIZES", TINY)
    command = ["bench", "decide", "--measure", str(tmp_path / "m.json")]
    for option, value, known in (
        ("size", "huge", "small, paper"),
        ("system", "rnn", "dsc"),
        ("weights", "int2", "stored"),
    ):
        done = CliRunner().invoke(main, [*command, f"--{option}", value])
        assert done.exit_code == 1 and f"--{option} is '{value}'; it must be one of {known}" in done.output
    late = AskedMachine(sizes=TINY, steps=FEW, minutes=1e-9, threads=1)
    measured, whole = measure_machine(late, tmp_path / "m.json")
    assert not whole and not measured.steps
