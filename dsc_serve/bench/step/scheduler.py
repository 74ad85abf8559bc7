"""The real scheduler against a simulated clock: what each policy does to the same requests, and what planning costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dsc_serve.engine.kv_cache import BlockPool
from dsc_serve.engine.policies import POLICIES, Plan, StepBudget
from dsc_serve.engine.request import Request
from dsc_serve.engine.scheduler import Scheduler
from dsc_serve.engine.step_time import Estimate, Load
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

BLOCK_SIZE = 16
WORDS = 16  # of a signature
VOCABULARY = 50_000
LONGEST_PROMPT, LONGEST_OUTPUT = 2048, 1024
TENANTS, TOPICS, SYSTEM_PROMPTS, SYSTEM_TOKENS = 8, 16, 8, 128
LONGEST = SYSTEM_TOKENS + LONGEST_PROMPT + LONGEST_OUTPUT
URGENT, NORMAL = 0, 1
TOKEN = 7  # what every simulated request generates
SHOWN = {  # by the names of figures
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "p99",
    "p99_ttft_urgent_ms": "urgent p99",
    "p99_ttft_other_tenants_ms": "small tenants p99",
    "median_itl_ms": "ITL p50",
    "p99_itl_ms": "p99",
    "output_throughput": "tokens/s",
    "atoms_per_step": "atoms/step",
    "prefix_hit_rate": "prefix hits",
    "preemptions": "preempted",
    "most_overtaken": "overtaken",
}

PAPER_SIZE = Estimate(step=4.0, single=0.3, token=0.045, pair=6e-5)

Work = Sequence[tuple[Request, int]]
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Costs:
    """What a simulated step takes."""

    load: Estimate = PAPER_SIZE  # in milliseconds
    atom_us: float = 0.5  # for each bit of its signatures

    def ms(self, load: Load, work: Work) -> float:
        chunks = self.load.token * load.tokens + self.load.pair * load.pairs
        return self.load.quiet_ms(load) + chunks + 1e-3 * self.atom_us * distinct_atoms(request for request, _ in work)


@dataclass(frozen=True)
class Workload:
    """Requests with Poisson arrivals at `load` times what the costs allow, of several tenants, topics and prompts.

    Tenants ask unequally often: the first for half of everything. A tenth of the requests is urgent. Half begin with
    one of a few system prompts. Requests of one topic pick mostly the same atoms.
    """

    requests: int = 10_000
    load: float = 0.9
    prompt_tokens: int = 192
    output_tokens: int = 48
    seed: int = 0

    def arrivals(self, costs: Costs, running: int) -> list[tuple[float, Request]]:
        """Seconds and requests, in order."""
        rng = np.random.default_rng(self.seed)
        topics = rng.random((TOPICS, 64 * WORDS)) < 0.06
        systems = rng.integers(0, VOCABULARY, (SYSTEM_PROMPTS, SYSTEM_TOKENS)).tolist()
        shares = 0.5 ** np.arange(1, TENANTS + 1)
        tenants = rng.choice(TENANTS, self.requests, p=shares / shares.sum())
        prompts = 1 + rng.lognormal(np.log(self.prompt_tokens), 0.8, self.requests).astype(int) % LONGEST_PROMPT
        outputs = 1 + rng.geometric(1 / self.output_tokens, self.requests) % LONGEST_OUTPUT
        seconds = 1e-3 * (
            costs.load.quiet_ms(Load(running)) / running * outputs.mean() + costs.load.token * prompts.mean()
        )
        times = np.cumsum(rng.exponential(seconds / self.load, self.requests))
        found = []
        for i in range(self.requests):
            tokens = rng.integers(0, VOCABULARY, int(prompts[i])).tolist()
            if rng.random() < 0.5:
                tokens = systems[rng.integers(SYSTEM_PROMPTS)] + tokens
            params = SamplingParams(max_tokens=int(outputs[i]), ignore_eos=True, seed=i)
            scheduling = SchedulingParams(
                tenant=f"tenant-{tenants[i]}", priority=URGENT if rng.random() < 0.1 else NORMAL
            )
            request = Request(str(i), len(tokens), tokens, params, int(outputs[i]), scheduling=scheduling)
            picked = topics[rng.integers(TOPICS)] & (rng.random(64 * WORDS) < 0.9) | (rng.random(64 * WORDS) < 0.002)
            request.signature = np.packbits(picked).view(np.uint64)
            found.append((float(times[i]), request))
        return found


@dataclass
class Recorder:
    """What clients would see."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    atoms: list[int] = field(default_factory=list)

    def step(self, now: float, ids: Iterable[str]) -> None:
        for request_id in ids:
            if request_id in self.last:
                self.gaps.append(now - self.last[request_id])
            else:
                self.first[request_id] = now
            self.last[request_id] = now


def simulate(
    policy: str, workload: Workload, costs: Costs, budget: StepBudget, blocks: int, prefix_cache: bool
) -> Figures:
    """Serve the workload with a scheduler whose clock moves by what each step costs; latencies in milliseconds."""
    now = 0.0
    pool = BlockPool(blocks)
    scheduler = Scheduler(POLICIES[policy], budget, pool, BLOCK_SIZE, prefix_cache, clock=lambda: now)
    arrivals = workload.arrivals(costs, budget.running)
    requests = [request for _, request in arrivals]
    arrived, seen, steps = 0, Recorder(), 0
    with tqdm(total=len(requests), desc=policy, disable=None, leave=False) as bar:
        while arrived < len(arrivals) or scheduler.running or scheduler.waiting:
            if not scheduler.running and not scheduler.waiting:
                now = max(now, arrivals[arrived][0])
            while arrived < len(arrivals) and arrivals[arrived][0] <= now:
                scheduler.add(arrivals[arrived][1])
                arrived += 1
                bar.update()
            plan = scheduler.plan()
            work = scheduler.begin(plan)
            ms = costs.ms(plan.load, work)
            now += 1e-3 * ms
            steps += 1
            seen.atoms.append(distinct_atoms(request for request, _ in work))
            seen.step(now, scheduler.commit(plan, tokens_of(work), frozenset()))
            scheduler.step_time.observe(plan.load, ms)
    if fault := scheduler.fault():
        raise RuntimeError(fault)
    return figures(requests, dict(enumerate(time for time, _ in arrivals)), seen, now) | {
        "steps": steps,
        "preemptions": scheduler.preemptions,
        "most_overtaken": max(request.overtaken for request in requests),
        "prefix_hit_rate": scheduler.cached_tokens / max(1, scheduler.prompt_tokens),
    }


def figures(requests: Sequence[Request], arrived: Mapping[int, float], seen: Recorder, end: float) -> Figures:
    ttft = np.array([seen.first[r.id] - arrived[i] for i, r in enumerate(requests)])
    urgent = np.array([r.scheduling.priority == URGENT for r in requests])
    busiest = np.array([r.scheduling.tenant == "tenant-0" for r in requests])
    gaps = np.array(seen.gaps)

    def ms(values: NDArray[np.float64], percent: float) -> float | None:
        return round(1e3 * float(np.percentile(values, percent)), 2) if len(values) else None

    return {
        "median_ttft_ms": ms(ttft, 50),
        "p99_ttft_ms": ms(ttft, 99),
        "p99_ttft_urgent_ms": ms(ttft[urgent], 99),
        "p99_ttft_other_tenants_ms": ms(ttft[~busiest], 99),
        "median_itl_ms": ms(gaps, 50),
        "p99_itl_ms": ms(gaps, 99),
        "output_throughput": round(sum(r.output_size for r in requests) / end, 1),
        "atoms_per_step": round(statistics.fmean(seen.atoms), 1),
    }


def distinct_atoms(requests: Iterable[Request]) -> int:
    """Bits that are set in the signature of any."""
    signatures = [request.signature for request in requests if request.signature is not None]
    return int(np.bitwise_count(np.bitwise_or.reduce(signatures)).sum()) if signatures else 0


def tokens_of(work: Work) -> dict[str, int]:
    return {request.id: TOKEN for request, count in work if request.num_computed + count == request.num_tokens}


def plan_commit_ms(policy: str, running: int, waiting: int = 0, steps: int = 200) -> float:
    """Median milliseconds of plan, begin and commit of a step, with so many running and waiting requests.

    With waiting ones a request ends after each step, so that every plan has to choose one to admit.
    """
    scheduler = Scheduler(POLICIES[policy], StepBudget(4 * running, running), BlockPool(2**20), BLOCK_SIZE)
    workload = Workload(requests=running + waiting, prompt_tokens=24, output_tokens=48)
    for _, request in workload.arrivals(Costs(), running):
        request.max_tokens = 10**6
        scheduler.add(request)
    while len(scheduler.running) < running or any(request.num_uncomputed > 1 for request in scheduler.running.values()):
        timed_step(scheduler)
    times = []
    for _ in range(steps):
        if waiting:
            scheduler.finish(next(iter(scheduler.running)))
        times.append(timed_step(scheduler))
    return 1e3 * statistics.median(times)


def timed_step(scheduler: Scheduler) -> float:
    """Seconds of plan, begin and commit."""
    start = time.perf_counter()
    plan: Plan = scheduler.plan()
    work = scheduler.begin(plan)
    planned = time.perf_counter() - start
    tokens = tokens_of(work)
    start = time.perf_counter()
    scheduler.commit(plan, tokens, frozenset())
    return planned + time.perf_counter() - start


def compare(
    policies: Sequence[str], workload: Workload, costs: Costs, budget: StepBudget, blocks: int, prefix_cache: bool
) -> dict[str, object]:
    """Everything that `dsc-serve bench scheduler` tells."""
    shapes = {"running_64": (64, 0), "running_1024": (1024, 0), "running_64_waiting_10000": (64, 10_000)}
    planning = {
        policy: {name: round(plan_commit_ms(policy, *shape), 4) for name, shape in shapes.items()}
        for policy in policies
    }
    results = {
        policy: simulate(policy, workload, costs, replace(budget), blocks, prefix_cache)
        | {"plan_commit_ms": planning[policy]}
        for policy in policies
    }
    return {"plan_commit_ms": planning[policies[0]], "policies": results}


def format_policies(result: Mapping[str, Any]) -> str:
    """A row for each policy, in Markdown."""
    planning = ", ".join(f"{shape} {ms}" for shape, ms in result["plan_commit_ms"].items())
    lines = [f"Plan, begin and commit, median ms: {planning}", ""]
    lines.append("| policy | " + " | ".join(SHOWN.values()) + " |")
    lines.append("|---" * (len(SHOWN) + 1) + "|")
    for policy, figures in result["policies"].items():
        cells = ("–" if figures[name] is None else f"{figures[name]:.4g}" for name in SHOWN)
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
