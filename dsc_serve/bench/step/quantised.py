"""What weights in few bits are worth: steps and prompts by the form of the weights, and beside llama.cpp's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import msgspec

from dsc_serve.bench.step.llama_peer import Peer
from dsc_serve.bench.step.profile import Reading
from dsc_serve.bench.step.streams import Streams, closing, greedy, sized
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.model.decoder import Decoder

PEER = "llama.cpp"
PROMPT_TOKENS = 48
PAUSE_S = 0.02  # until threads of the program that was just measured sleep
READ_SAMPLES = 5


class HeldForm(msgspec.Struct, frozen=True):
    """A model with its weights held so."""

    name: str
    model: Decoder
    config: EngineConfig

    @property
    def nbytes(self) -> int:
        """Of all weights, each once, but for an embedding of its own, of which a step reads some rows."""
        return sum(self.model.held.values()) - self.model.embedding_bytes


class StepRow(msgspec.Struct, frozen=True):
    """Steps of one system at a number of streams: medians, and the range of the rounds' ratios to the first system."""

    system: str
    streams: int
    step_ms: float
    tokens_per_s: float
    ratio: float
    lowest: float
    highest: float
    # step_ms beside reading the weights' bytes once at this machine's rate; None: of another program
    read_ratio: float | None = None
    peer_ratio: float | None = None  # the median of the rounds' ratios to that program; None where none was measured


class PromptRow(msgspec.Struct, frozen=True):
    """Milliseconds of a prompt, their ratio to the first system's, and to another program's where one was measured."""

    system: str
    tokens: int
    ms: float
    ratio: float
    lowest: float
    highest: float
    peer_ratio: float | None = None


class Ratios(msgspec.Struct, frozen=True):
    median: float
    lowest: float
    highest: float


def ratios(rounds: Sequence[Sequence[float]], place: int) -> Ratios:
    """Of a system to the first, round by round."""
    found = [spent[place] / spent[0] for spent in rounds]
    return Ratios(statistics.median(found), min(found), max(found))


def peer_ratio(rounds: Sequence[Sequence[float]], place: int, peer: Peer | None) -> float | None:
    """Of a system to the peer, which is the last, where there is one: the median of the rounds'."""
    return None if peer is None else statistics.median(spent[place] / spent[-1] for spent in rounds)


def in_turn(systems: Sequence[Callable[[], float]], number: int) -> list[float]:
    """What each system says in the round of this number; every second one is backwards."""
    found = [0.0] * len(systems)
    for place in (range(len(systems)), reversed(range(len(systems))))[number % 2]:
        time.sleep(PAUSE_S)
        found[place] = systems[place]()
    return found


def decode(forms: Sequence[HeldForm], peer: Peer | None, streams: int, steps: int, rounds: int) -> list[StepRow]:
    """Steps of all systems in turn, so many at a time."""
    running = [Streams(form.model, form.config, streams, PROMPT_TOKENS, steps * rounds) for form in forms]
    readings = [Reading(form.nbytes, form.model) for form in forms]
    with closing(*running):
        systems: list[Callable[[], float]] = []
        for own in running:
            own.begin()
            systems.append(lambda own=own: statistics.median(own.step() for _ in range(steps)))  # type: ignore[misc]
        if peer is not None:
            peer.begin(streams, PROMPT_TOKENS)
            systems.append(lambda: statistics.median(peer.steps(steps)))
        found: list[list[float]] = []
        for number in range(rounds):
            found.append(in_turn(systems, number))
            for reading in readings:
                for _ in range(READ_SAMPLES):
                    reading.sample()
    rows = []
    for place, name in enumerate(names(forms, peer)):
        ms, ratio = statistics.median(spent[place] for spent in found), ratios(found, place)
        least = 1e3 * forms[place].nbytes / readings[place].bandwidth if place < len(forms) else None
        rows.append(
            StepRow(
                system=name,
                streams=streams,
                step_ms=ms,
                tokens_per_s=1e3 * streams / ms,
                ratio=ratio.median,
                lowest=ratio.lowest,
                highest=ratio.highest,
                read_ratio=None if least is None else ms / least,
                peer_ratio=peer_ratio(found, place, peer),
            )
        )
    return rows


def prompts(forms: Sequence[HeldForm], peer: Peer | None, tokens: int, rounds: int) -> list[PromptRow]:
    """Prompts of all systems in turn, to their first token; nothing is found again of the one before."""
    engines = [Engine.for_model(form.model, sized(form.config, 2 * tokens + 64, 1)) for form in forms]
    asked = 0

    def first_token(engine: Engine) -> float:
        nonlocal asked
        asked += 1
        prompt = [(asked * 7919 + 31 * j) % engine.capacity.vocab_size for j in range(tokens)]
        began = time.perf_counter()
        engine.add(str(asked), prompt, greedy(1))
        while engine.has_work or engine.arrivals:
            engine.arrivals.wait()
            engine.step()
        return 1e3 * (time.perf_counter() - began)

    systems: list[Callable[[], float]] = [lambda own=own: first_token(own) for own in engines]  # type: ignore[misc]
    if peer is not None:
        systems.append(lambda: peer.prompt(tokens))
    try:
        for system in systems:
            system()
        found = [in_turn(systems, number) for number in range(rounds)]
    finally:
        for engine in engines:
            engine.close()
    rows = []
    for place, name in enumerate(names(forms, peer)):
        ratio = ratios(found, place)
        ms = statistics.median(spent[place] for spent in found)
        beside = peer_ratio(found, place, peer)
        rows.append(PromptRow(name, tokens, ms, ratio.median, ratio.lowest, ratio.highest, beside))
    return rows


def names(forms: Sequence[HeldForm], peer: Peer | None) -> list[str]:
    return [form.name for form in forms] + ([PEER] if peer is not None else [])


def format_tokens(rows: Sequence[StepRow]) -> str:
    """Tokens per second by streams, and how many times those of another program they are."""
    streams = list(dict.fromkeys(row.streams for row in rows))
    lines = ["| tokens per second | " + " | ".join(counted(n) for n in streams) + " |"]
    lines.append("|---" * (1 + len(streams)) + "|")
    beside = []
    for name in dict.fromkeys(row.system for row in rows):
        own = [row for row in rows if row.system == name]
        lines.append(f"| {name} | " + " | ".join(f"{row.tokens_per_s:.1f}" for row in own) + " |")
        if name != PEER and all(row.peer_ratio is not None for row in own):
            times = (f"{1 / row.peer_ratio:.2f}" for row in own if row.peer_ratio)
            beside.append(f"| {name}, times {PEER}'s | " + " | ".join(times) + " |")
    return "\n".join([*lines, *beside])


def counted(streams: int) -> str:
    return f"{streams} stream{'s' * (streams > 1)}"


def format_steps(rows: Sequence[StepRow]) -> str:
    lines = ["| system | streams | ms a step | time beside the first's | lowest, highest | beside reading |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        reading = "" if row.read_ratio is None else f"{row.read_ratio:.2f}"
        lines.append(
            f"| {row.system} | {row.streams} | {row.step_ms:.3f} | {row.ratio:.3f} | "
            f"{row.lowest:.3f}, {row.highest:.3f} | {reading} |"
        )
    return "\n".join(lines)


def format_prompts(rows: Sequence[PromptRow]) -> str:
    lines = ["| system | prompt | ms | time beside the first's | lowest, highest | beside llama.cpp's |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        beside = "" if row.peer_ratio is None else f"{row.peer_ratio:.3f}"
        lines.append(
            f"| {row.system} | {row.tokens} | {row.ms:.1f} | {row.ratio:.3f} | {row.lowest:.3f}, {row.highest:.3f} | "
            f"{beside} |"
        )
    return "\n".join(lines)
