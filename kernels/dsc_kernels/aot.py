"""Compiles every GPU kernel without a GPU and reads from the machine code what it will cost there.

The tools (disassembler, cuobjdump) come inside Triton's wheel. What this cannot say is how long a kernel takes.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import click

TARGETS = ("sm_80", "sm_90", "gfx942")
BUDGETS = Path(__file__).parent / "gpu" / "budgets.json"
LIMITS = ("registers", "shared_bytes", "spills")  # may not grow
FLOORS = ("wide_loads", "matrix_instructions")  # may not vanish


class Row(TypedDict):
    """What one compiled kernel needs.

    registers: per thread (vector registers on AMD); shared_bytes: per program; spills: instructions that move registers
    to and from memory (on AMD spilled registers); wide_loads: loads of 16 bytes a thread, in the code, not as executed;
    matrix_instructions: tensor-core or matrix-core instructions in the code.
    """

    kernel: str
    config: str
    target: str
    registers: int
    shared_bytes: int
    spills: int
    wide_loads: int
    matrix_instructions: int


@dataclass(frozen=True)
class Sizes:
    """The sizes that kernels are compiled for; all in bfloat16."""

    d: int
    atoms: int
    k: int
    hidden: int  # of an expert, padded as `layers.Moe` does
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_size: int
    block: int = 16


CONFIGS = {
    "paper": Sizes(384, 1523, 4, 560, 5, 2, 6, 6, 64),
    "large": Sizes(4096, 16384, 32, 14336, 8, 2, 32, 8, 128),
}


@dataclass(frozen=True)
class Job:
    """A kernel, the constants it is compiled with (compiler options among them), and the types of its arguments."""

    name: str
    function: Any
    constants: dict[str, Any]
    types: dict[str, str]


BF16, HALF, FLOAT, INT, LONG = "*bf16", "*fp16", "*fp32", "*i32", "*i64"
SCALARS = dict.fromkeys(("batch", "outputs", "atoms", "groups", "q_stride", "table_stride", "kv_heads"), "i32")
SCALARS |= dict.fromkeys(("tau", "eps", "norm_eps", "scale"), "fp32")


def dsc_jobs(s: Sizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import contract, expand, router, select, select_compose

    groups = -(-s.atoms // router.GROUP)
    route = {"x": BF16, "weight": BF16, "bias": FLOAT, "logits": FLOAT, "maxima": FLOAT}
    for label, batch in (("small", 1), ("large", router.SMALL_BATCH + 1)):
        meta = router.blocks(batch, s.atoms, torch.bfloat16)
        yield Job(f"route.{label}", router.route, {**meta, "d": s.d, "normed": True}, route)
    logits = {"logits": FLOAT, "maxima": FLOAT}
    trace = {"picks": INT, "coefficients": FLOAT, "signals": FLOAT}
    bank = {"u": BF16, "v": BF16, "gamma": FLOAT, "static": BF16, "residual": BF16, "out": BF16, "x": BF16}
    choices = {"softmax": False}
    yield Job("select", select.select_tokens, {**select.blocks(s.k, groups), **choices}, {**logits, **trace})
    untraced: dict[str, Any] = {**choices, "scalar_gamma": False, **dict.fromkeys(trace)}
    meta = {**select_compose.blocks(s.k, groups, s.d, 0), **untraced}
    yield Job("select_compose", select_compose.select_compose_tokens, meta, {**logits, **bank})
    meta = contract.blocks(s.k, 1, s.d)
    stretches = -(-s.d // meta["d_per_block"])
    yield Job("contract", contract.contract_rows, meta, {**bank, **trace, "latent": FLOAT})
    meta = {**expand.blocks(s.k, 1, s.d), "stretches": stretches, "scalar_gamma": False}
    yield Job("expand", expand.expand_columns, meta, {**bank, **trace, "latent": FLOAT})


def moe_jobs(s: Sizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import moe

    types = {"x": BF16, "weight": BF16, "scales": FLOAT, "order": INT, "offsets": INT}
    for label, rows in (("small", s.experts_per_token), ("large", s.experts * moe.LARGE_TILE)):
        meta = {**moe.blocks(rows, s.experts, torch.bfloat16), "k": s.experts_per_token, "gate": None}
        up = {"inner": s.d, "outer": s.hidden, "first": True, "activation": "gelu", "scales": None}
        down = {"inner": s.hidden, "outer": s.d, "first": False, "activation": "none"}
        yield Job(f"experts_up.{label}", moe.multiply_experts, {**meta, **up}, {**types, "out": BF16})
        yield Job(f"experts_down.{label}", moe.multiply_experts, {**meta, **down}, {**types, "out": FLOAT})
    combining = moe.combine_blocks(s.experts_per_token, s.d)
    yield Job("combine", moe.combine_slots, combining, {"slots": FLOAT, "residual": BF16, "out": BF16})


def attention_jobs(s: Sizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import attention

    types = {"q": BF16, "keys": BF16, "values": BF16, "tables": LONG, "contexts": LONG, "stats": FLOAT}
    for label, splits, out in (("attend", 1, BF16), ("attend.split", 8, FLOAT)):
        meta = attention.blocks(s.heads // s.kv_heads, s.head_size, s.block, splits, torch.bfloat16)
        constants = meta if splits > 1 else {**meta, "stats": None}
        yield Job(label, attention.attend, constants, {**types, "out": out})
    merge = attention.merge_blocks(s.head_size, 8)
    yield Job("merge_splits", attention.merge_splits, merge, {"parts": FLOAT, "stats": FLOAT, "out": BF16})


def quantised_jobs(s: Sizes) -> Iterator[Job]:
    from dsc_kernels.gpu import quantised

    for bits in (4, 8):
        types = {"x": BF16, "values": "*u8" if bits == 4 else "*i8", "scales": HALF, "minimums": HALF, "out": FLOAT}
        for label, batch in (("small", 1), ("large", quantised.FEW)):
            constants = {**quantised.blocks(batch), "d": s.d, "bits": bits, "group": 32}
            yield Job(f"multiply_int{bits}.{label}", quantised.multiply_levels, constants, types)


def jobs(config: str) -> Iterator[Job]:
    """Everything that is compiled for a configuration of CONFIGS."""
    sizes = CONFIGS[config]
    yield from dsc_jobs(sizes)
    yield from moe_jobs(sizes)
    yield from attention_jobs(sizes)
    yield from quantised_jobs(sizes)


def compile_job(job: Job, target: str) -> Any:
    """The compiled kernel; pointers are 16-byte aligned, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    constants = dict(job.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    if amd:
        options["num_stages"] = min(options.get("num_stages", 2), 2)
    names = job.function.arg_names
    types = {**SCALARS, **job.types}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name.endswith("_stride") or signature[name].startswith("*") for name in names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = ASTSource(fn=job.function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=options)


def amd_figures(assembly: str) -> dict[str, int]:
    fields = {name: int(value) for name, value in re.findall(r"\.([sv]gpr_\w+):\s*(\d+)", assembly)}
    return {
        "registers": fields["vgpr_count"],
        "spills": fields["vgpr_spill_count"] + fields["sgpr_spill_count"],
        "wide_loads": len(re.findall(r"^\s*(?:global|buffer)_load_(?:lds_)?dwordx4\b", assembly, re.MULTILINE)),
        "matrix_instructions": len(re.findall(r"^\s*v_mfma_", assembly, re.MULTILINE)),
    }


def nvidia_figures(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool.path, flag, file.name], check=True, capture_output=True, text=True).stdout
            for tool, flag in ((knobs.nvidia.cuobjdump, "-res-usage"), (knobs.nvidia.nvdisasm, "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)[.\s]", code)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E[\w.]*\.128\b", code)),
        "matrix_instructions": len(re.findall(r"\b(?:HGMMA|HMMA)[.\s]", code)),
    }


def measure(job: Job, config: str, target: str) -> Row:
    compiled = compile_job(job, target)
    code = compiled.asm
    figures = amd_figures(code["amdgcn"]) if target.startswith("gfx") else nvidia_figures(code["cubin"])
    return {
        "kernel": job.name,
        "config": config,
        "target": target,
        "registers": figures["registers"],
        "shared_bytes": compiled.metadata.shared,
        "spills": figures["spills"],
        "wide_loads": figures["wide_loads"],
        "matrix_instructions": figures["matrix_instructions"],
    }


def report(targets: Iterable[str] = TARGETS, configs: Iterable[str] = tuple(CONFIGS)) -> list[Row]:
    """One row for each kernel, configuration of CONFIGS and target of TARGETS.

    Raises RuntimeError in a process where Triton interprets kernels instead of compiling them.
    """
    from dsc_kernels.gpu.compiler import interpreted

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted here and cannot be compiled; unset it")
    targets = tuple(targets)
    return [measure(job, config, target) for config in configs for job in jobs(config) for target in targets]


def broken_budgets(rows: Iterable[Row], budgets: Iterable[Row]) -> list[str]:
    """What exceeds its budget, or falls below it where more is better, or has none: one line each."""
    allowed = {(b["kernel"], b["config"], b["target"]): b for b in budgets}
    broken = []
    for row in rows:
        key = (row["kernel"], row["config"], row["target"])
        budget = allowed.get(key)
        if budget is None:
            broken.append(f"{' '.join(key)}: no budget")
            continue
        found: dict[str, Any] = {**row}
        limits: dict[str, Any] = {**budget}
        broken += [f"{' '.join(key)}: {n} {found[n]}, at most {limits[n]}" for n in LIMITS if found[n] > limits[n]]
        broken += [f"{' '.join(key)}: {n} {found[n]}, at least {limits[n]}" for n in FLOORS if found[n] < limits[n]]
    return broken


def table(rows: list[Row]) -> str:
    """Rows as aligned text."""
    names = list(Row.__annotations__)
    cells = [names, *([str(dict(row)[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = 3
    return "\n".join(
        "  ".join(c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


@click.command("aot")
@click.option("--target", "targets", type=click.Choice(TARGETS), multiple=True, help="Repeatable [default: all].")
@click.option("--config", "configs", type=click.Choice(list(CONFIGS)), multiple=True, help="Repeatable [default: all].")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows as JSON.")
def aot_command(targets: tuple[str, ...], configs: tuple[str, ...], file: Path | None) -> None:
    """Compile the GPU kernels (no GPU is needed) and print what each will need there."""
    try:
        rows = report(targets or TARGETS, configs or tuple(CONFIGS))
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed: pip install 'dsc-serve[gpu]'") from None
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table(rows))
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    aot_command()
