"""Runs a comparison: every system on the same cores, under the same loads and prompts, in interleaved rounds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.bench.compare.comparison import LEAST_REQUESTS, ComparedSystem, Comparison, ComparisonError
from dsc_serve.bench.compare.processes import (
    ServerProcess,
    ServerStartError,
    cpu_seconds,
    free_port,
    memory_bytes,
    running,
)
from dsc_serve.bench.compare.prompt_steps import PROMPT_STEPS, share_between, step_counts
from dsc_serve.bench.compare.results import Contestant, ResultRow, Results
from dsc_serve.bench.compare.resuming import Deadline, OutOfTimeError, go_on_from, loads, missing
from dsc_serve.bench.load.generator import LoadConfig, LoadError, run_load
from dsc_serve.bench.load.lengths import parse_lengths
from dsc_serve.bench.load.made_up_tokenizer import save_tokenizer
from dsc_serve.bench.load.prompts import ask_source
from dsc_serve.bench.machine import describe_machine, load_average, widest_instructions
from dsc_serve.config import ConfigError
from dsc_serve.text.tokenizer import TokenizerError

MAKE_LIMIT_S = 1800.0  # of a model: the banks of large ones are made orthogonal
DYING_S = 1.0  # from when a server's connections break until its end can be seen, at most
WARM_REQUESTS = 6  # before each: a system that waited while others ran begins slowly
SHARED = ("config", "client", "url", "model", "date", "failure_examples")  # of figures that rows need not repeat
CLI = (sys.executable, "-P", "-m", "dsc_serve.cli")

Report = Callable[[str], None]
Keep = Callable[[Results], None]


def run_tool(command: Sequence[str]) -> str:
    """What a command of ours prints. Raises StartError."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_LIMIT_S, check=False)
    if done.returncode:
        raise ServerStartError(
            f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-1000:]}"
        )
    return done.stdout


def model_folder(system: ComparedSystem, comparison: Comparison, work: Path) -> Path:
    """The system's model; one of random weights is made where there is none yet. Raises StartError."""
    if system.folder:
        if system.ours and not Path(system.folder).exists():
            raise ServerStartError(f"its model {system.folder} does not exist")
        return Path(system.folder)
    form = system.form or system.ffn
    equal = () if system.equal is None else ("--equal", system.equal)
    balanced = system.form is None and system.ffn != "dense"
    folder = work / "-".join((comparison.preset, str(form), *equal[1:], *(["balanced"] if balanced else [])))
    if not (folder / "config.json").is_file():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        if system.form is not None:
            options = ("--form", system.form, "--preset", comparison.preset)
            run_tool([*CLI, "bench", "peer-model", str(unfinished), *options])
        else:
            command = [*CLI, "init", "--ffn", str(form), "--preset", comparison.preset, *equal]
            run_tool([*command, *(["--balanced"] if balanced else []), "--out", str(unfinished)])
            content = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
            save_tokenizer(content["vocab_size"], unfinished)
        unfinished.rename(folder)
    return folder


def serve_command(system: ComparedSystem, folder: Path, port: int, threads: int) -> list[str]:
    """How the system is started."""
    if not system.ours:
        values = {"folder": str(folder), "port": str(port), "threads": str(threads)}
        return [part.format(**values) for part in system.command]
    command = [*CLI, "serve", str(folder), "--port", str(port), "--threads", str(threads)]
    for name, value in system.settings.items():
        flag = name.replace("_", "-")
        command += (
            ([f"--{flag}"] if value else [f"--no-{flag}"]) if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return command


def shown(command: Sequence[str], environment: Mapping[str, str], work: Path) -> str:
    """A command for people: without the folders of this machine."""
    text = " ".join([*(f"{name}={value}" for name, value in environment.items()), *command])
    return text.replace(" ".join(CLI), "dsc-serve").replace(f"{work}/", "").replace(f"{Path.cwd()}/", "")


def program_version(system: ComparedSystem) -> str:
    """What the program of another system says of its version, in one line; empty where it says nothing."""
    if system.ours:
        return f"dsc-serve {version('dsc-serve')}"
    try:
        done = subprocess.run(
            [system.command[0], "--version"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | system.environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return f"{Path(system.command[0]).name} {lines[-1][:80]}" if lines and not done.returncode else ""


class ComparisonRun:
    """The systems of one comparison, and how to have them run."""

    def __init__(self, comparison: Comparison, work: Path, report: Report) -> None:
        self.comparison, self.work, self.report = comparison, work, report
        self.contestants = {system.name: Contestant(name=system.name) for system in comparison.system}
        self.folders: dict[str, Path] = {}
        self.threads = comparison.threads or len(os.sched_getaffinity(0))

    def prepare(self) -> None:
        """Make the models and look inside them; a system that cannot take part is skipped, with the reason."""
        for system in self.comparison.system:
            contestant = self.contestants[system.name]
            contestant.weights = system.weights
            if not system.ours and shutil.which(system.command[0]) is None:
                self.skip(system, f"{system.command[0]} is not installed")
                continue
            self.report(f"{system.name}: its model")
            try:
                folder = self.folders[system.name] = model_folder(system, self.comparison, self.work)
                self.inspect_folder(system, folder)
            except (ServerStartError, OSError, subprocess.TimeoutExpired) as error:
                self.skip(system, str(error))
                continue
            contestant.version = ", ".join(filter(None, (program_version(system), contestant.version)))
            command = serve_command(system, folder, 8000, self.threads)
            contestant.command = shown(command, system.environment, self.work)

    def inspect_folder(self, system: ComparedSystem, folder: Path) -> None:
        contestant = self.contestants[system.name]
        command = [
            sys.executable,
            "-P",
            "-m",
            "dsc_serve.bench.step.inspect_model",
            str(folder),
            "--threads",
            str(self.threads),
        ]
        if not system.ours:
            command.append("--foreign")
        else:
            command += ["--router", str(system.settings.get("router_precision", "auto"))]
            for count in self.comparison.profiled:
                command += ["--running", str(count)]
        found = json.loads(run_tool(command))
        contestant.description, contestant.steps = found["description"], found["steps"]
        contestant.version = f"torch {found['torch']}" if system.ours else ""

    def skip(self, system: ComparedSystem, reason: str, when: str = "") -> None:
        self.contestants[system.name].skipped = reason
        self.report(f"{system.name} is skipped{when}: {reason}")

    def taking_part(self) -> list[ComparedSystem]:
        """The systems that run, the baseline first: what it completes sets the rates of open loads."""
        systems = [system for system in self.comparison.system if not self.contestants[system.name].skipped]
        return sorted(systems, key=lambda system: system.name != self.comparison.baseline)

    @contextmanager
    def started(self, system: ComparedSystem) -> Iterator[ServerProcess | None]:
        """The system's server, stopped at the end; None where it does not come up, which skips it."""
        contestant, port = self.contestants[system.name], free_port()
        command = serve_command(system, self.folders[system.name], port, self.threads)
        log = self.work / f"{system.name.replace(' ', '-')}.log"
        with ExitStack() as stack:
            server = None
            try:
                server = ServerProcess(command, system.environment, port, log)
                stack.enter_context(running(server, self.comparison.start_timeout_s))
                contestant.start_s = round(server.start_s, 2)
            except (ServerStartError, OSError) as error:
                self.skip(system, str(error))
                server = None
            yield server


def load_config(
    comparison: Comparison, system: ComparedSystem, url: str, load: str, value: float, number: int, rate: float
) -> LoadConfig:
    """A load of a round; equal for all systems but for where it goes. rate: requests per second of an open one."""
    closed = load == "closed"
    streams = int(value) if closed else 1
    return LoadConfig(
        url=url,
        models=system.models,
        arrivals="closed" if closed else "poisson",
        concurrency=streams,
        request_rate=rate,
        requests=max(LEAST_REQUESTS, streams * comparison.waves) if closed else 10**6,
        duration_s=comparison.request_timeout_s if closed else comparison.rate_seconds,
        warmup=max(WARM_REQUESTS, streams),
        timeout_s=comparison.request_timeout_s,
        prompt_file=comparison.prompt_file or None,
        tokenizer=(comparison.tokenizer or None) if comparison.prompt_file else None,
        vocab_size=comparison.vocab_size,
        prompt_tokens=comparison.prompt_tokens,
        output_tokens=comparison.output_tokens,
        temperature=comparison.temperature,
        ignore_eos=system.ignore_eos,
        goodput=tuple(f"{name}:{limit:g}" for name, limit in comparison.limits.items()),
        seed=zlib.crc32(f"{comparison.seed} {load} {value:g} {number}".encode()),  # no load's prompts are another's
    )


def check_prompts(comparison: Comparison) -> None:
    """Raises ComparisonError where the prompts cannot be made: before models are, and servers start."""
    try:
        next(
            ask_source(
                prompt_file=comparison.prompt_file or None,
                tokenizer=(comparison.tokenizer or None) if comparison.prompt_file else None,
                prompt_tokens=parse_lengths("prompt_tokens", comparison.prompt_tokens),
            )
        )
    except (ConfigError, TokenizerError) as error:
        raise ComparisonError(str(error)) from None


def run_comparison(
    comparison: Comparison,
    work: Path,
    command: str,
    alone: bool,
    report: Report,
    keep: Keep = lambda _: None,
    before: Results | None = None,
    deadline: Deadline | None = None,
) -> Results:
    """Measure. alone: only one system runs at a time, started anew in every round; else all run, and those that are
    not measured wait idle. keep: is given the results after each load, so that whatever stops the rest loses nothing.
    before: results of the same comparison on the same machine, whose loads are not measured again. deadline: after
    which no load begins; what is missing then a later run has to measure.
    Failures of single systems skip them; raises ComparisonError for what stops all."""
    check_prompts(comparison)
    arena = ComparisonRun(comparison, work, report)
    results = Results(
        title=comparison.title,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        client=command,
        machine={
            **describe_machine(),
            "instructions": widest_instructions(),
            "threads": arena.threads,
            "load_before": load_average(),
        },
        comparison=msgspec.to_builtins(comparison),
        systems=list(arena.contestants.values()),
    )
    if before is not None:
        go_on_from(before, results)

    def save() -> None:
        results.machine["load_after"] = load_average()
        keep(results)

    deadline = deadline or Deadline()
    try:
        arena.prepare()
        measure_rounds(arena, results, alone, deadline, save)
    except OutOfTimeError:
        report("its time is over; the same command with --resume goes on")
    save()
    return results


def measure_rounds(
    arena: ComparisonRun, results: Results, alone: bool, deadline: Deadline, save: Callable[[], None]
) -> None:
    """What is missing of all rounds. Raises OutOfTimeError where a load would begin after the deadline."""
    comparison = arena.comparison
    if alone:
        for number in range(comparison.rounds):
            for system in arena.taking_part():
                if not missing(comparison, results, system, number):
                    continue
                deadline.check()
                with arena.started(system) as server:
                    if server is not None:
                        measure_round(arena, results, {system.name: server}, number, deadline, save)
        return
    with ExitStack() as stack:
        servers = {}
        rounds = range(comparison.rounds)
        for system in arena.taking_part():
            if not any(missing(comparison, results, own, number) for own in arena.taking_part() for number in rounds):
                break
            deadline.check()
            arena.report(f"{system.name}: starting")
            server = stack.enter_context(arena.started(system))
            if server is not None:
                servers[system.name] = server
        for number in rounds if servers else ():
            measure_round(arena, results, servers, number, deadline, save)


def rotated(systems: list[ComparedSystem], number: int) -> list[ComparedSystem]:
    """Another one comes first in each round, and every second round runs backwards: what a system leaves behind, such
    as threads that spin for a while, is not always felt by the same one."""
    step = -1 if number % 2 else 1
    return [systems[(number + step * i) % len(systems)] for i in range(len(systems))]


def measure_round(
    arena: ComparisonRun,
    results: Results,
    servers: Mapping[str, ServerProcess],
    number: int,
    deadline: Deadline,
    save: Callable[[], None],
) -> None:
    """Every load on every running system, load by load: none begins after the deadline, on all or on nobody."""
    comparison = arena.comparison
    systems = rotated([system for system in arena.taking_part() if system.name in servers], number)
    left = {system.name: missing(comparison, results, system, number) for system in systems}
    for load, value in loads(comparison):
        if any((load, value) in own for own in left.values()):
            deadline.check()
        for system in systems:
            if (load, value) not in left[system.name]:
                continue
            arena.report(f"round {number + 1} of {comparison.rounds}, {load} {value:g}: {system.name}")
            if arena.contestants[system.name].skipped:
                continue
            rate = value * peak_rate(results, comparison.baseline) if load == "open" else 1.0
            if not rate:
                arena.report(f"{comparison.baseline} completed nothing, so there is no rate for open loads")
                continue
            config = load_config(comparison, system, servers[system.name].url, load, value, number, rate)
            row = measured_row(arena, config, servers, system)
            if row is not None:
                results.rows.append(msgspec.structs.replace(row, load=load, value=value, round=number))
        save()
    for system in systems:
        contestant = arena.contestants[system.name]
        contestant.memory_bytes = contestant.memory_bytes or memory_bytes(servers[system.name].pids())


def measured_row(
    arena: ComparisonRun, config: LoadConfig, servers: Mapping[str, ServerProcess], system: ComparedSystem
) -> ResultRow | None:
    """One load on one system, with what the servers used meanwhile; None where its server does not answer or has ended,
    which skips the system from here on."""
    name = system.name
    steps = step_counts(servers[name].url) if system.ours else None
    before, begun = {other: cpu_seconds(server.pids()) for other, server in servers.items()}, time.perf_counter()
    try:
        result = run_load(config)
    except LoadError as error:
        arena.skip(system, servers[name].end(DYING_S) or str(error), " from here on")
        return None
    if end := servers[name].end(DYING_S if result.to_dict()["failed"] else 0.0):
        arena.skip(system, end, " from here on")
        return None
    taken = time.perf_counter() - begun
    used = {other: max(0.0, cpu_seconds(server.pids()) - before[other]) / taken for other, server in servers.items()}
    figures: dict[str, Any] = {key: value for key, value in result.to_dict().items() if key not in SHARED}
    figures["client_cpu"] = result.client["client_cpu"]
    if steps is not None:  # of the requests that warm it up too
        figures[PROMPT_STEPS] = share_between(steps, step_counts(servers[name].url))
    return ResultRow(
        system=name,
        load="closed",
        value=0,
        round=0,
        figures=figures,
        server_cpu=round(used.pop(name), 3),
        others_cpu=round(sum(used.values()), 3),
    )


def peak_rate(results: Results, baseline: str) -> float:
    """The most requests per second that the baseline completed in a closed loop of its first round: later ones offer
    the same open loads."""
    rows = [row for row in results.rows if (row.system, row.load) == (baseline, "closed") and row.counts]
    first = min((row.round for row in rows), default=0)
    return max((row.figures["request_throughput"] for row in rows if row.round == first), default=0.0)
