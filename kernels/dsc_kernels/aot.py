"""Compiles every GPU kernel without a GPU and reads from the machine code what it will cost there.

What this cannot say is how long a kernel takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import click

from dsc_kernels.machine_code import amd_figures, nvidia_figures

TARGETS = ("sm_80", "sm_90", "gfx942")
BUDGETS = Path(__file__).parent / "gpu" / "budgets.json"
LIMITS = ("registers", "shared_bytes", "spills", "loop_shuffles")  # may not grow
FLOORS = ("wide_loads", "matrix_instructions", "warpgroup_instructions", "copies_in_flight")  # may not vanish


class BudgetRow(TypedDict):
    """What one compiled kernel needs."""

    kernel: str
    config: str
    target: str
    registers: int  # per thread (vector registers on AMD)
    shared_bytes: int  # per program
    spills: int  # instructions that move registers to and from memory (on AMD spilled registers)
    wide_loads: int  # loads of 16 bytes a thread, in the code, not as executed
    matrix_instructions: int  # tensor-core or matrix-core instructions in the code
    warpgroup_instructions: int  # those of them that four warps issue together (sm_90's wgmma)
    loop_shuffles: int  # moves between lanes, in the loops that hold them, on NVIDIA
    # Groups of copies to shared memory that a barrier leaves on their way in these loops (without a loop, any)
    copies_in_flight: int


@dataclass(frozen=True)
class AotSizes:
    """The sizes that kernels are compiled for; all in bfloat16."""

    d: int
    atoms: int
    k: int
    static: int  # width of a DSC layer's static MLP
    hidden: int  # of an expert, padded as `layers.Moe` does
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_size: int
    block: int = 16


CONFIGS = {
    "paper": AotSizes(384, 1523, 4, 320, 560, 5, 2, 6, 6, 64),
    "large": AotSizes(4096, 16384, 32, 8192, 14336, 8, 2, 32, 8, 128),
}


@dataclass(frozen=True)
class Job:
    """A kernel, the constants it is compiled with (compiler options among them), and the types of its arguments."""

    name: str
    function: Any
    constants: dict[str, Any]
    types: dict[str, str]


BF16, HALF, FLOAT, DOUBLE, INT, LONG = "*bf16", "*fp16", "*fp32", "*fp64", "*i32", "*i64"
SEQUENCES, PLACES, CHUNK_TOKENS = 64, 8, 512  # of a step, its chunks and their tokens, where these are constants
MANY_EXPERTS = 128
INTEGERS: tuple[str, ...] = ("batch", "outputs", "atoms", "groups", "q_stride", "table_stride", "kv_heads", "heads")
INTEGERS += ("sequences", "most", "window", "part_stride", "token_stride", "logits_stride", "slots", "row_tiles")
INTEGERS += ("vocabulary", "places")
SCALARS = {**dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(("tau", "eps", "norm_eps", "scale", "cap"), "fp32")}
SCALARS |= dict.fromkeys(("rstd_eps", "weight_scale"), "fp32")
ALIGNED = "_stride", "groups", "vocabulary"  # that 16 divides in these sizes, as Triton sees when it launches

TRACE = {"picks": INT, "coefficients": FLOAT, "signals": FLOAT}
BANK = {"u": BF16, "v": BF16, "gamma": FLOAT, "static": BF16, "residual": BF16, "out": BF16, "x": BF16}
NORM = {"residual": BF16, "terms": FLOAT, "total_out": BF16, "normed_out": BF16, "rstd_out": FLOAT, "length_out": FLOAT}
NORM |= dict.fromkeys(("weight", "norm_weight"), BF16)
TOKENS = {"one": 1, "few": 64, "many": 65}  # of a step: the least, and the two sides of what is fused for wide models


def product_jobs(s: AotSizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import add_norm, product, qkv

    dtype, heads = torch.bfloat16, s.heads + 2 * s.kv_heads
    slots = dict.fromkeys(("positions", "slot_blocks", "slot_offsets"), INT)
    cache = {"q": BF16, "keys": BF16, "values": BF16, "cos_sin": FLOAT, "qkv": BF16, "weight": BF16, "x": BF16}
    for label, tokens in TOKENS.items():
        meta = product.tiles(tokens, s.d, dtype)
        splits = product.split_count(tokens, s.d, s.heads * s.head_size, meta)
        constants = {**meta, "d": s.heads * s.head_size, "splits": splits, "bias": None}
        yield Job(f"multiply.{label}", product.multiply_rows, constants, {"x": BF16, "weight": BF16, "parts": FLOAT})
        meta = qkv.head_tiles(tokens, heads * s.head_size, s.head_size, dtype)
        constants = {**meta, "size": s.head_size, "block": s.block, "d": s.d, "bias": None}
        yield Job(f"project.{label}", qkv.project_heads, constants, {**cache, **slots})
    meta = {**qkv.prepare_blocks(s.head_size, s.block, s.head_size), "query_norm": None, "key_norm": None}
    yield Job("prepare_heads", qkv.prepare_heads, meta, {**cache, **slots})
    meta = {**add_norm.blocks(s.d), "count": 2, "further": None, "bias": None}
    yield Job("add_norm", add_norm.add_norm_rows, meta, NORM)


def dsc_jobs(s: AotSizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import contract, expand, ffn_in, rescore, select, select_compose
    from dsc_kernels.gpu.screen import SCREENED_TOKENS

    groups, dtype = -(-s.atoms // ffn_in.GROUP), torch.bfloat16
    types = {"router": BF16, "router_bias": FLOAT, "rstd": FLOAT, "logits": FLOAT, "maxima": FLOAT, "x": BF16}
    raised = {"up": BF16, "hidden": BF16}
    screen = {"levels": "*i8", "scales": BF16, "errors": FLOAT, "length": FLOAT}
    bare: dict[str, Any] = {"up_bias": None, "gate_bias": None}
    whole = dict.fromkeys(screen)
    for label, tokens in TOKENS.items():
        meta = {**ffn_in.blocks(tokens, s.atoms + s.static, dtype), **bare, "gate": None, "d": s.d}
        constants = {**meta, **whole, "activation": "gelu"}
        yield Job(f"route_and_raise.{label}", ffn_in.route_and_raise, constants, {**types, **raised})
        alone = {"up": None, "hidden": None, "activation": "none", **whole}
        meta |= ffn_in.blocks(tokens, s.atoms, dtype, beside=False)
        yield Job(f"route.{label}", ffn_in.route_and_raise, {**meta, **alone}, types)
    for label, tokens in (("one", 1), ("few", SCREENED_TOKENS)):
        tiles = ffn_in.blocks(tokens, s.atoms + s.static, dtype)
        meta = {**tiles, **bare, "gate": None, "d": s.d, "activation": "gelu"}
        yield Job(f"screen_and_raise.{label}", ffn_in.route_and_raise, meta, {**types, **raised, **screen})
        meta = {**rescore.rescore_blocks(tokens, s.atoms, groups, s.k, tiles), "d": s.d}
        yield Job(f"rescore.{label}", rescore.rescore_rows, meta, {**types, "lowest": FLOAT, "counts": LONG})
    logits = {"logits": FLOAT, "maxima": FLOAT}
    choices = {"softmax": False}
    yield Job("select", select.select_tokens, {**select.blocks(s.k, groups), **choices}, {**logits, **TRACE})
    untraced: dict[str, Any] = {**choices, "scalar_gamma": False, **dict.fromkeys(TRACE), "down_bias": None}
    product = {"hidden": BF16, "down": BF16, "parts": FLOAT}
    for label, tokens in TOKENS.items():
        meta = select_compose.beside_blocks(s.k, groups, s.d, 0, tokens, s.static, dtype)
        constants = {**meta, **untraced, "static": None}
        function = select_compose.select_compose_tokens
        yield Job(f"compose_beside.{label}", function, constants, {**logits, **BANK, **product, "out": FLOAT})
    alone = {**select_compose.ALONE, **dict.fromkeys(product)}
    meta = {**select_compose.blocks(s.k, groups, s.d, 0), **untraced, **alone}
    yield Job("select_compose", select_compose.select_compose_tokens, meta, {**logits, **BANK})
    meta = contract.blocks(s.k, 1, s.d)
    stretches = -(-s.d // meta["d_per_block"])
    yield Job("contract", contract.contract_rows, meta, {**BANK, **TRACE, "latent": FLOAT})
    meta = {**expand.blocks(s.k, 1, s.d), "stretches": stretches, "scalar_gamma": False}
    yield Job("expand", expand.expand_columns, meta, {**BANK, **TRACE, "latent": FLOAT})


def moe_jobs(s: AotSizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import moe, pick_experts, place_slots, route_experts
    from dsc_kernels.weights import MoeOptions

    few, many = MoeOptions(activation="gelu", k=s.experts_per_token), MoeOptions(activation="silu", k=8)
    types = {"x": BF16, "weight": BF16, "gate": BF16, "scales": FLOAT}
    types |= {"shared_x": BF16, "shared_weight": BF16, "shared_gate": BF16, "shared_scales": FLOAT}
    types |= dict.fromkeys(("picks", "order", "offsets"), INT)
    alone = dict.fromkeys(("shared_x", "shared_weight", "shared_gate", "shared_scales", "shared_out"))
    alone |= {"gate": None, "shared_inner": 0, "shared_outer": 0}
    for label, batch, k, experts in (
        ("small", 1, few.k, s.experts),
        ("shared", 16, many.k, MANY_EXPERTS),  # gated, a shared expert beside them
        ("large", 1024, few.k, s.experts),
    ):
        sorts = label == "large"
        rows: dict[str, Any] = {"picks": None} if sorts else {"order": None, "offsets": None}
        meta = {**moe.blocks(batch, k, experts, torch.bfloat16, sorts), **rows, "outputs_per_token": k}
        up: dict[str, Any] = {"inner": s.d, "outer": s.hidden, "first": True, "activation": "gelu", "scales": None}
        down: dict[str, Any] = {"inner": s.hidden, "outer": s.d, "first": False, "activation": "none", "gate": None}
        if label == "shared":
            meta |= {"outputs_per_token": k + 1}
            up |= {"shared_inner": s.d, "shared_outer": s.static, "shared_scales": None}
            down |= {"shared_inner": s.static, "shared_outer": s.d, "shared_gate": None}
        else:
            meta |= alone
        for name, constants, out in (("up", up, BF16), ("down", down, FLOAT)):
            outs = {"out": out, "shared_out": out}
            yield Job(f"experts_{name}.{label}", moe.multiply_experts, {**meta, **constants}, {**types, **outs})
    picked = {"logits": FLOAT, "weights_out": FLOAT, "experts_out": INT, "router": BF16, "router_bias": FLOAT}
    weighed = {"shared_gate": FLOAT, "shared_weights": FLOAT}
    bare = {"choice_bias": None}
    yield Job("pick", pick_experts.pick_tokens, {**pick_experts.pick_blocks(MANY_EXPERTS, many), **bare}, picked)
    meta = {"count": 2, "further": None, "norm_bias": None, **bare, **dict.fromkeys(weighed)}
    meta |= route_experts.add_norm_pick_blocks(s.experts, s.d, few, True)
    yield Job("add_norm_pick", route_experts.add_norm_pick, meta, {**NORM, **picked})
    meta = {"count": 2, "further": None, "norm_bias": None}
    meta |= route_experts.score_blocks(SEQUENCES, MANY_EXPERTS, s.d, False)
    yield Job("add_norm_score", route_experts.add_norm_score, meta, {**NORM, **picked, **weighed})
    sorted_ = {"picks": INT, "order": INT, "offsets": INT}
    for label, experts in (("few", s.experts), ("many", MANY_EXPERTS)):
        yield Job(f"place.{label}", place_slots.place_slots, place_slots.place_blocks(experts), sorted_)


def attention_jobs(s: AotSizes) -> Iterator[Job]:
    import torch

    from dsc_kernels.gpu import attention, chunk_attention

    group, dtype = s.heads // s.kv_heads, torch.bfloat16
    yield Job("plan_splits", attention.plan_splits, attention.plan_blocks(SEQUENCES), {"contexts": INT, "plan": INT})
    types = {"q": BF16, "keys": BF16, "values": BF16, "tables": INT, "contexts": INT, "plan": INT, "out": BF16}
    types |= {"parts": FLOAT, "stats": FLOAT}
    meta = attention.blocks(group, s.head_size, s.block, SEQUENCES, dtype)
    yield Job("attend", attention.attend, meta, types)
    yield Job("merge_splits", attention.merge_splits, attention.merge_blocks(s.head_size), types)
    meta = chunk_attention.plan_meta(PLACES, CHUNK_TOKENS, group)
    yield Job("plan_tiles", chunk_attention.plan_tiles, meta, {"places": INT, "work": INT})
    meta = chunk_attention.blocks(group, s.head_size, s.block, dtype)
    yield Job("attend_chunks", chunk_attention.attend_chunks, meta, {**types, "work": INT})


def quantised_jobs(s: AotSizes) -> Iterator[Job]:
    from dsc_kernels.gpu import quantised

    for bits in (4, 8):
        types = {"x": BF16, "values": "*u8" if bits == 4 else "*i8", "scales": HALF, "minimums": HALF, "out": FLOAT}
        for label, batch in (("small", 1), ("large", quantised.FEW)):
            constants = {**quantised.blocks(batch), "d": s.d, "bits": bits, "group": 32}
            yield Job(f"multiply_int{bits}.{label}", quantised.multiply_levels, constants, types)


def sampling_jobs(_: AotSizes) -> Iterator[Job]:
    from dsc_kernels.gpu import sample

    yield Job("sample", sample.sample_rows, sample.blocks(), {"weights": FLOAT, "parameters": DOUBLE, "tokens": LONG})


def jobs(config: str, target: str = "sm_90") -> list[Job]:
    """Everything that is compiled for a configuration of CONFIGS, with the tile sizes for a target."""
    from dsc_kernels.gpu.compiler import tuned_for

    with tuned_for(amd=target.startswith("gfx")):
        families = (product_jobs, dsc_jobs, moe_jobs, attention_jobs, quantised_jobs, sampling_jobs)
        return [job for family in families for job in family(CONFIGS[config])]


def compile_job(job: Job, target: str) -> Any:
    """The compiled kernel, chained as `compiler.chain` says; pointers are 16-byte aligned, as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dsc_kernels.gpu.compiler import chain_of

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    constants = {**job.constants, **chain_of(None if amd else gpu.arch)}
    options: dict[str, Any] = {"num_stages": 2} if amd else {}
    options |= {name: constants.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in constants}
    names, types = job.function.arg_names, {**SCALARS, **job.types}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [
        signature[name].startswith("*") or (name.endswith(ALIGNED) and signature[name] == "i32") for name in names
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = ASTSource(fn=job.function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=options)


def measure(job: Job, config: str, target: str) -> BudgetRow:
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
        "warpgroup_instructions": figures["warpgroup_instructions"],
        "loop_shuffles": figures["loop_shuffles"],
        "copies_in_flight": figures["copies_in_flight"],
    }


def report(targets: Iterable[str] = TARGETS, configs: Iterable[str] = tuple(CONFIGS)) -> list[BudgetRow]:
    """One row for each kernel, configuration of CONFIGS and target of TARGETS.

    Raises RuntimeError in a process where Triton interprets kernels instead of compiling them.
    """
    from dsc_kernels.gpu.compiler import interpreted

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted here and cannot be compiled; unset it")
    targets, rows = tuple(targets), []
    for config in configs:
        for same in zip(*(jobs(config, target) for target in targets), strict=True):
            rows += [measure(job, config, target) for job, target in zip(same, targets, strict=True)]
    return rows


def broken_budgets(rows: Iterable[BudgetRow], budgets: Iterable[BudgetRow]) -> list[str]:
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


def table(rows: list[BudgetRow]) -> str:
    """Rows as aligned text."""
    names = list(BudgetRow.__annotations__)
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
