"""Ratios of systems kept by kind of machine, and what has moved since they were kept."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dsc_serve.bench.compare.results import Results

KEPT = ("median_itl_ms", "output_throughput")
VENDORS = ("AMD", "Intel", "Ampere", "Apple")  # by whose kinds ratios are kept; of others, by their processors
MOVED = 0.1  # of a ratio, from which on it is said


class Kept(msgspec.Struct):
    """Ratios of one machine kind."""

    date: str
    ratios: dict[str, float]  # by system, figure and streams, to the baseline


def machine_kind(results: Results) -> str:
    """What makes ratios comparable: the processor's vendor, its widest instruction set and the number of threads."""
    cpu = str(results.machine["cpu"])
    vendor = next((name for name in VENDORS if name.lower() in cpu.lower()), cpu)
    return ", ".join(filter(None, (vendor, results.machine["instructions"], f"{results.machine['threads']} threads")))


def ratios_of(results: Results) -> dict[str, float]:
    """Every system's figures to the baseline's, by a name that says which."""
    baseline = str(results.comparison["baseline"])
    found = {}
    for name in results.measured():
        for figure in KEPT:
            for value in results.points("closed"):
                ratio = results.ratio(name, baseline, "closed", value, figure)
                if name != baseline and ratio is not None:
                    found[f"{name} / {baseline}, {figure}, {value:g} streams"] = round(ratio.median, 3)
    return found


def read_kept(file: Path) -> dict[str, Kept]:
    """By machine kind; nothing where there is no such file. Raises DecodeError."""
    return msgspec.json.decode(file.read_bytes(), type=dict[str, Kept]) if file.is_file() else {}


def keep(results: Results, file: Path) -> None:
    """Write this machine kind's ratios, beside those of others."""
    kept = read_kept(file) | {machine_kind(results): Kept(results.date[:10], ratios_of(results))}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")


def moved(results: Results, file: Path) -> list[str]:
    """Lines that say of which kind this machine is, and what differs from the kept ratios by more than a tenth."""
    kept, kind = read_kept(file), machine_kind(results)
    found = f"machine kind: {kind} ({results.machine['cpu']})"
    known = kept.get(kind)
    if known is None:
        others = "; ".join(kept) or "no kind"
        return [found, f"{file} has no ratios of this kind, but of {others}; --keep-ratios adds them"]
    now = ratios_of(results)
    lines = [
        f"moved by {now[name] / was - 1:+.0%}: {name}: {was:.2f} on {known.date}, {now[name]:.2f} now"
        for name, was in known.ratios.items()
        if name in now and abs(now[name] / was - 1) > MOVED
    ]
    lines += [f"not measured now: {name}" for name in known.ratios if name not in now]
    lines += [f"not kept: {name}: {ratio:.2f} now" for name, ratio in now.items() if name not in known.ratios]
    return (
        [found, *lines]
        if lines
        else [found, f"nothing moved by more than {MOVED:.0%} since {known.date} ({len(known.ratios)} ratios)"]
    )
