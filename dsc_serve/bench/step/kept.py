"""What a command of this folder measured and kept by --json, as a document's tables."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.bench.step import adapter_kinds, adapters, context, quality, quantised, tenant_memory, tenants

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


TABLES: dict[str, Callable[[Found], str]] = {  # by the word after `dsc-serve bench`
    "context": context_tables,
    "quantised": quantised_tables,
    "adapters": adapters_tables,
    "tenants": tenants_tables,
}


def load_kept(file: Path) -> Found:
    """Raises UnknownResultsError where the file is none that one of TABLES is of."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        if kind_of(found) in TABLES:
            return found
    except (msgspec.DecodeError, KeyError, IndexError, AttributeError):
        pass
    raise UnknownResultsError(f"{file} was not written by --json of bench {', '.join(TABLES)}")


def kind_of(found: Found) -> str:
    return shlex.split(found["command"])[2]


def markdown_of_kept(found: Found) -> str:
    """The tables, and what measured them when."""
    machine = {name.replace("_", " "): value for name, value in found["machine"].items()}
    date = machine.pop("date")
    told = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"{TABLES[kind_of(found)](found)}\n\n`{found['command']}`, {date}; {told}."
