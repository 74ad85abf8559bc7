"""What tenants of a bank cost: steps of as many as there are streams, beside other kinds and the base, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.bench.step.adapter_kinds import room_for, write_kind
from dsc_serve.bench.step.adapters import PROMPT_TOKENS
from dsc_serve.bench.step.streams import Streams, closing, interleaved
from dsc_serve.config import EngineConfig
from dsc_serve.files import CheckpointError
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.tenant import bank_of, write_tenant

BIAS, GAMMA = 1.0, 0.1  # deviations: biases so wide that tenants pick different atoms
TENANTS = "tenants"
TITLES = {"lora": "LoRA r {}", "shared": "cores K {}", "lora-xs": "LoRA-XS r {}"}

Choices = Sequence[AdapterChoice | None]
System = tuple[Decoder, EngineConfig, Choices]


class TenantStep(msgspec.Struct, frozen=True):
    """Steps of so many streams."""

    system: str
    streams: int
    step_ms: float  # median of a step
    ratio: float  # of that to the first system's
    lowest: float  # of the rounds' ratios
    highest: float  # likewise
    read_bytes: int  # of the distinct adapters, in a step


def choices(names: Sequence[str]) -> Choices:
    return [AdapterChoice.of(name) for name in names]


def write_tenants(model: Decoder, folder: Path, count: int) -> list[str]:
    """Write so many random tenants of a model's bank; returns their names. Raises CheckpointError without a bank."""
    bank = bank_of(model.config)
    if bank is None:
        raise CheckpointError("the model has no bank; `dsc-serve graft` makes it one")
    layers, ffn = bank
    width = model.config.hidden_size if ffn.gamma == "vector" else 1
    names = [f"bank-{i:04d}" for i in range(count)]
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        bias = BIAS * torch.randn(layers, ffn.num_atoms, generator=generator)
        write_tenant(folder / name, bias, GAMMA * torch.randn(layers, width, generator=generator), ffn.bank)
    return names


def folder_of(
    model: Decoder, folder: Path, tenants: int, ranks: Mapping[str, int], count: int
) -> tuple[Mapping[str, list[str]], int]:
    """Tenants and as many as `count` of other kinds in one folder, by system, and the bytes that all take at most.

    ranks: of the other kinds.
    """
    systems = {TENANTS: write_tenants(model, folder, tenants)}
    bank = bank_of(model.config)
    assert bank is not None
    layers, ffn = bank
    room = tenants * layers * 4 * (ffn.num_atoms + 16 + 2 * model.config.hidden_size)
    for kind, rank in ranks.items():
        systems[TITLES[kind].format(rank)] = write_kind(model, folder, kind, count, rank)
        room += room_for(model, kind, count, rank)
    return systems, room


def measure(systems: Mapping[str, System], streams: int, steps: int, rounds: int) -> list[TenantStep]:
    """Steps of all systems in turn, each with so many streams; the first is what the others are compared with."""
    own = {
        name: Streams(model, config, streams, PROMPT_TOKENS, steps * rounds)
        for name, (model, config, _) in systems.items()
    }
    with closing(*own.values()):
        for name, (_, _, choices) in systems.items():
            own[name].begin(choices[:streams])
        reports = [one.engine.adapter_report for one in own.values()]
        before = [report.read_bytes for report in reports]
        for one in own.values():
            one.step()
        sizes = [report.read_bytes - read for report, read in zip(reports, before, strict=True)]
        times = [interleaved(list(own.values()), steps) for _ in range(rounds)]
    found = []
    for i, name in enumerate(own):
        ratios = [each[i] / each[0] for each in times]
        found.append(
            TenantStep(
                system=name,
                streams=streams,
                step_ms=statistics.median(each[i] for each in times),
                ratio=statistics.median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                read_bytes=sizes[i],
            )
        )
    return found


def format_table(rows: Sequence[TenantStep]) -> str:
    lines = ["| streams | system | ms a step | times the first | lowest, highest | MB of adapters read |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.streams} | {row.system} | {row.step_ms:.3f} | {row.ratio:.3f} | {row.lowest:.3f}, "
            f"{row.highest:.3f} | {row.read_bytes / 1e6:.2f} |"
        )
    return "\n".join(lines)
