"""What one command measured and kept by --json, as a document's tables."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.bench.layer.beside import beside_of, format_beside
from dsc_serve.bench.layer.measurement import LayerResult, LayerRow
from dsc_serve.bench.layer.sweep import SweepRow
from dsc_serve.bench.layer.table import ceilings, layer_lines, sweep_lines
from dsc_serve.bench.load.overload import OverloadRound, format_overload
from dsc_serve.bench.step import (
    adapter_kinds,
    adapters,
    batching,
    bursts,
    context,
    forward,
    profile,
    quality,
    quantised,
    scheduler,
    speculation,
    tenant_memory,
    tenants,
)
from dsc_serve.bench.step.device_steps import DeviceStep, format_device_steps
from dsc_serve.bench.step.harness import LongPrompt, SharedPrefix, format_prompts

Found = Mapping[str, Any]


class UnknownResultsError(ValueError):
    """A file that holds nothing of what is made into tables; one line that says why."""


def context_tables(found: Found) -> str:
    return context.format_rows(msgspec.convert(found["rows"], list[context.ContextRow]))


def quantised_tables(found: Found) -> str:
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["bytes"].items())
    rows = msgspec.convert(found["steps"], list[quantised.StepRow])
    steps = f"{quantised.format_tokens(rows)}\n\n{quantised.format_steps(rows)}"
    prompts = quantised.format_prompts(msgspec.convert(found["prompts"], list[quantised.PromptRow]))
    costs = quality.format_quality(msgspec.convert(found.get("quality", []), list[quality.QualityRow]))
    return f"Weights: {sizes}.\n\n{steps}\n\n{prompts}" + (f"\n\n{costs}" if found.get("quality") else "")


def adapters_tables(found: Found) -> str:
    parts = [
        adapters.format_beside(msgspec.convert(found["beside"], list[adapters.BesideLoaded])),
        adapters.format_tenants(msgspec.convert(found["tenants"], list[adapters.ManyTenants])),
        adapters.format_cold(msgspec.convert(found["cold"], adapters.ColdStart)),
        adapter_kinds.format_costs(msgspec.convert(found["kinds"], list[adapter_kinds.KindCost])),
        adapter_kinds.format_memory(msgspec.convert(found["memory"], list[adapter_kinds.KindMemory])),
    ]
    return "\n\n".join(parts)


def tenants_tables(found: Found) -> str:
    steps = tenants.format_table(msgspec.convert(found["steps"], list[tenants.TenantStep]))
    if "memory" not in found:
        return steps
    return f"{steps}\n\n{tenant_memory.format_memory(msgspec.convert(found['memory'], tenant_memory.TenantMemory))}"


def forward_tables(found: Found) -> str:
    rows = [forward.ForwardRow(**row) for row in found["rows"]]
    bench = forward.ForwardBench(**found["bench"])
    return forward.format_forward(forward.ForwardResult(bench, found["machine"], found["date"], rows))


def engine_tables(found: Found) -> str:
    parts = []
    if "profiles" in found:
        cpu = found["machine"].get("device", "cpu") == "cpu"
        parts.append(
            profile.format_profiles(msgspec.convert(found["profiles"], list[profile.StepProfile]))
            if cpu
            else format_device_steps(msgspec.convert(found["profiles"], list[DeviceStep]))
        )
    if "long_prompt" in found:
        long, shared = found["long_prompt"], found["shared_prefix"]
        parts.append(format_prompts(msgspec.convert(long, LongPrompt), msgspec.convert(shared, SharedPrefix)))
    return "\n\n".join(fenced(part) for part in parts)


def layer_tables(found: Found) -> str:
    swept = "atoms" in found["rows"][0]
    result: LayerResult[Any] = LayerResult(found["machine"], found["command"], found["date"], found["notes"])
    result.roofline = found["roofline"]
    result.rows = [(SweepRow if swept else LayerRow)(**row) for row in found["rows"]]
    lines = sweep_lines(result) if swept else layer_lines(result)
    text = "\n".join([*result.notes, ceilings(result), *lines])
    if "beside" in found:
        words = shlex.split(found["command"])
        text += "\n" + format_beside(beside_of(found["beside"]), words[words.index("--config") + 1])
    return fenced(text)


def batching_tables(found: Found) -> str:
    rows = msgspec.convert(found["rows"], list[batching.BatchingRow])
    caches = msgspec.convert(found["caches"], list[batching.CacheRow])
    return batching.format_batching(batching.BatchingResult(found["machine"], found["model"], rows, caches))


def bursts_tables(found: Found) -> str:
    rows = msgspec.convert(found["rows"], list[bursts.BurstRow])
    return bursts.format_bursts(rows, msgspec.convert(found["bench"], bursts.BurstBench))


def speculation_tables(found: Found) -> str:
    rows = msgspec.convert(found["rows"], list[speculation.Row])
    widths = msgspec.convert(found["widths"], list[speculation.WidthRow])
    return f"{speculation.format_rows(rows)}\n\n{speculation.format_widths(widths)}"


def overload_tables(found: Found) -> str:
    return format_overload(msgspec.convert(found["rounds"], list[OverloadRound]), found["factor"])


def fenced(text: str) -> str:
    """What is lined up by spaces."""
    return f"```\n{text.strip()}\n```"


TABLES: dict[str, Callable[[Found], str]] = {  # by the word after `dsc-serve bench`
    "context": context_tables,
    "quantised": quantised_tables,
    "adapters": adapters_tables,
    "tenants": tenants_tables,
    "forward": forward_tables,
    "engine": engine_tables,
    "layer": layer_tables,
    "batching": batching_tables,
    "bursts": bursts_tables,
    "speculation": speculation_tables,
    "scheduler": scheduler.format_policies,
    "overload": overload_tables,
}


def load_kept(file: Path) -> Found:
    """Raises UnknownResultsError where the file is none that one of TABLES is of."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        if kind_of(found) in TABLES and isinstance(found.get("machine"), dict):
            return found
    except (msgspec.DecodeError, KeyError, IndexError, AttributeError):
        pass
    known = ", ".join(TABLES)
    raise UnknownResultsError(f"{file} was not written by bench compare, nor by --json of bench {known}")


def kind_of(found: Found) -> str:
    return shlex.split(found["command"])[2]


def markdown_of_kept(found: Found) -> str:
    """The tables, and what measured them when."""
    machine = {name.replace("_", " "): value for name, value in found["machine"].items()}
    date = machine.pop("date", None) or found["date"]
    told = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"{TABLES[kind_of(found)](found)}\n\n`{found['command']}`, {date}; {told}."
