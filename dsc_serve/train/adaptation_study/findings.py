"""What a study of adapters found, in sentences that rules make of its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean, median
from typing import Any

LEVEL = 0.002  # of bits per byte: windows are few, and what differs by less is called level

Bits = Mapping[str, float]


def own_bits(kind: Mapping[str, Any], texts: list[str]) -> list[float]:
    """Of every text under its own tenant's adapter; under the one adapter where there is one for all."""
    rows: Mapping[str, Bits] = kind["bits"]
    only = next(iter(rows)) if len(rows) == 1 else None
    return [rows[only or text][text] for text in texts]


def change(bits: list[float], before: list[float]) -> float:
    """The mean over texts of the relative change."""
    return mean(one / other - 1 for one, other in zip(bits, before, strict=True))


def percent(part: float) -> str:
    return f"{100 * part:+.1f} %".replace("-", "−")


def wins(kind: Mapping[str, Any], texts: list[str]) -> int:
    """On how many texts no other tenant's adapter is better than its own."""
    rows: Mapping[str, Bits] = kind["bits"]
    return sum(rows[text][text] <= min(row[text] for row in rows.values()) for text in texts)


def findings(result: Mapping[str, Any]) -> Iterator[str]:
    texts, kinds = list(result["texts"]), result["kinds"]
    if not result["base_bits"] or not kinds:
        yield "Nothing has been measured of any kind yet."
        return
    base = [result["base_bits"][text] for text in texts]
    gains = {name: change(own_bits(own, texts), base) for name, own in kinds.items()}
    tenants = {name: gain for name, gain in gains.items() if name != "mixed"}
    if tenants:
        best = min(tenants, key=tenants.__getitem__)
        levels = [kinds[name]["title"] for name, gain in tenants.items() if name != best and gain - gains[best] < LEVEL]
        beside = f"; level with it: {', '.join(levels)}" if levels else ""
        yield (
            f"At equal training tokens {kinds[best]['title']} is best on the tenants' own texts: "
            f"{percent(gains[best])} bits per byte against the base in the mean{beside}."
        )
    if "mixed" in gains:
        yield from general(gains, kinds)
    for name in tenants:
        on = f"on {wins(kinds[name], texts)} of {len(texts)} texts"
        yield f"{kinds[name]['title']}: no other tenant's adapter is better than a text's own {on}."
    for name, other in result["equal_bytes"].items():
        yield equal_bytes(kinds[name], kinds[other], texts)
    if "certificates" in result and {"lora", "shared"} <= kinds.keys():
        yield sharing(result, gains)
    if "refusal" in result:
        own = result["refusal"]
        word = "are refused" if own["refused"] else "are NOT refused, which is a fault"
        yield (
            f"{own['adapters']} unaligned adapters of rank {own['rank']} {word} by a basis of {own['basis']} at "
            f"--max-error {own['max_error']}: {100 * own['left_out'][1]:.0f} % of an update is left out in the median."
        )


def general(gains: Mapping[str, float], kinds: Mapping[str, Any]) -> Iterator[str]:
    mixed = gains["mixed"]
    yield f"One LoRA of all texts together gives {percent(mixed)}: so much of a gain is general."
    for name, gain in gains.items():
        if name == "mixed" or name not in kinds:
            continue
        if abs(gain - mixed) < LEVEL:
            said = "is level with it"
        else:
            said = f"is {'better' if gain < mixed else 'worse'} than it by {abs(100 * (gain - mixed)):.1f} points"
        yield f"{kinds[name]['title']} {said}."


def equal_bytes(kind: Mapping[str, Any], other: Mapping[str, Any], texts: list[str]) -> str:
    by = change(own_bits(kind, texts), own_bits(other, texts))
    times = other["tenant_bytes"] / kind["tenant_bytes"]
    said = "is level with" if abs(by) < LEVEL else f"has {percent(by)} bits per byte against"
    return (
        f"At {kind['tenant_bytes']:,} bytes a tenant, {kind['title']} {said} {other['title']}, which takes "
        f"{times:.2f} times as many bytes."
    )


def sharing(result: Mapping[str, Any], gains: Mapping[str, float]) -> str:
    left = median(own["median_share"] for own in result["certificates"].values())
    before, after = gains["lora"], gains["shared"]
    if before >= 0:
        kept = "and the LoRAs had no gain to keep"
    elif after >= 0:
        kept = "and nothing of the LoRAs' gain is kept"
    else:
        kept = f"and {100 * after / before:.0f} % of the LoRAs' gain is kept"
    return (
        f"The shared basis leaves {100 * left:.1f} % of an update's norm out in the median of tenants' medians, "
        f"{kept}: {percent(before)} before, {percent(after)} after."
    )
