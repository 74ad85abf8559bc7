"""Selection and composition, beside the static MLP's second product or after it, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2, stages
from dsc_kernels.gpu.product import multiply_tile, split_count, tiles
from dsc_kernels.gpu.select import prepare_logits, select_atoms, sizes
from dsc_kernels.weights import OUTPUT_ONLY, AtomBank, FfnOptions, LayerOutputs

WIDE = 2048  # d from which a token's rows are many kilobytes each


@kernel
def spread(values: tl.tensor, width: tl.constexpr, rank_width: tl.constexpr) -> tl.tensor:
    """Each of values [width] repeated for the rows of its adapter: [width · rank_width]."""
    return tl.reshape(tl.broadcast_to(values[:, None], (width, rank_width)), (width * rank_width,))


@kernel
def compose_token(
    logits: tl.tensor,
    maxima: tl.tensor,
    x: tl.tensor,
    u: tl.tensor,
    v: tl.tensor,
    gamma: tl.tensor,
    static: tl.tensor,
    out: tl.tensor,
    picks: tl.tensor,
    coefficients: tl.tensor,
    signals: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    token: tl.tensor,
    k: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    groups_width: tl.constexpr,
    rank: tl.constexpr,
    rank_width: tl.constexpr,
    softmax: tl.constexpr,
    scalar_gamma: tl.constexpr,
    d: tl.constexpr,
    d_per_step: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """One token's composition, and the static output where it is given, to its row of out."""
    atom, weights, signal = select_atoms(
        logits + token * groups * group,
        maxima + token * groups,
        atoms,
        groups,
        eps,
        k,
        width,
        group,
        groups_width,
        softmax,
    )
    place = tl.arange(0, width)
    if picks is not None:
        tl.store(picks + token * k + place, atom, mask=place < k)
    if coefficients is not None:
        tl.store(coefficients + token * k + place, weights, mask=place < k)
    if signals is not None:
        tl.store(signals + token, signal)

    step = tl.arange(0, d_per_step)
    if rank_width == 1:
        row = atom
        is_row = place < k
    else:
        adapter_row = tl.arange(0, rank_width)
        row = tl.reshape(atom[:, None] * rank + adapter_row[None, :], (width * rank_width,))
        is_row = tl.reshape((place < k)[:, None] & (adapter_row < rank)[None, :], (width * rank_width,))
        weights = spread(weights, width, rank_width)
    rows = row.to(tl.int64)[:, None] * d + step[None, :]
    latent = tl.zeros((width * rank_width,), tl.float32)
    for start in tl.range(0, d, d_per_step, num_stages=stages):
        inside = start + step < d
        x_tile = tl.load(x + token * d + start + step, mask=inside, other=0.0).to(tl.float32)
        u_tile = tl.load(u + rows + start, mask=is_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        latent += tl.sum(u_tile * x_tile[None, :], 1)
    latent = tl.where(is_row, latent * weights, 0.0)
    for start in tl.range(0, d, d_per_step, num_stages=stages):
        inside = start + step < d
        at = token * d + start + step
        v_tile = tl.load(v + rows + start, mask=is_row[:, None] & inside[None, :], other=0.0).to(tl.float32)
        scale = tl.load(gamma) if scalar_gamma else tl.load(gamma + start + step, mask=inside, other=0.0)
        total = tl.sum(v_tile * latent[:, None], 0) * scale
        if static is not None:
            total += tl.load(static + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@kernel
def select_compose_tokens(
    logits: tl.tensor,
    maxima: tl.tensor,
    x: tl.tensor,
    u: tl.tensor,
    v: tl.tensor,
    gamma: tl.tensor,
    static: tl.tensor,
    out: tl.tensor,
    picks: tl.tensor,
    coefficients: tl.tensor,
    signals: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    hidden: tl.tensor,
    down: tl.tensor,
    down_bias: tl.tensor,
    parts: tl.tensor,
    batch: tl.tensor,
    k: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    groups_width: tl.constexpr,
    rank: tl.constexpr,
    rank_width: tl.constexpr,
    softmax: tl.constexpr,
    scalar_gamma: tl.constexpr,
    d: tl.constexpr,
    d_per_step: tl.constexpr,
    stages: tl.constexpr,
    inner: tl.constexpr,
    splits: tl.constexpr,
    rows_per_block: tl.constexpr,
    tokens_per_block: tl.constexpr,
    inner_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One token, or behind all of them a tile of hidden · W_2ᵀ: grid (batch + tiles,)."""
    follow(chained)
    program = tl.program_id(0)
    if program < batch:
        compose_token(
            logits,
            maxima,
            x,
            u,
            v,
            gamma,
            static,
            out,
            picks,
            coefficients,
            signals,
            atoms,
            groups,
            eps,
            program.to(tl.int64),
            k,
            width,
            group,
            groups_width,
            rank,
            rank_width,
            softmax,
            scalar_gamma,
            d,
            d_per_step,
            stages,
        )
    if hidden is not None:  # noqa: SIM102  this is decided when the kernel is compiled
        if program >= batch:
            token_tiles = (batch + tokens_per_block - 1) // tokens_per_block
            row_tiles: tl.constexpr = (d + rows_per_block - 1) // rows_per_block
            tile = program - batch
            multiply_tile(
                hidden,
                down,
                down_bias,
                parts,
                batch,
                d,
                tile % token_tiles,
                tile // token_tiles % row_tiles,
                tile // token_tiles // row_tiles,
                inner,
                splits,
                rows_per_block,
                tokens_per_block,
                inner_per_step,
            )


def blocks(k: int, groups: int, d: int, rank: int) -> Meta:
    """Widths and warps: about 64 gathered values a lane, and of wide rows several steps on their way."""
    rank_width = power_of_2(max(rank, 1))
    rows = power_of_2(k) * rank_width
    warps = 1 if rows <= 4 else 2 if rows <= 8 else 4
    tiles = {"d_per_step": min(power_of_2(d), max(2048 * warps // rows, 64)), "stages": stages(3) if d >= WIDE else 1}
    return {**sizes(k, groups), "rank": max(rank, 1), "rank_width": rank_width, **tiles, "d": d, "num_warps": warps}


def beside_blocks(k: int, groups: int, d: int, rank: int, batch: int, inner: int, dtype: torch.dtype) -> Meta:
    """Those of both: the product's tiles, of four warps, with which a token's rows are gathered, too."""
    meta, product = blocks(k, groups, d, rank), tiles(batch, d, dtype)
    product["inner_per_step"] = product.pop("d_per_step")
    splits = split_count(batch, d, inner, {**product, "d_per_step": product["inner_per_step"]})
    rows = meta["width"] * meta["rank_width"]
    gathered = {"d_per_step": min(power_of_2(d), max(8192 // rows, 64))}
    return {**meta, **gathered, **product, "inner": inner, "splits": splits}


ALONE: Meta = {"inner": 1, "splits": 1, "rows_per_block": 16, "tokens_per_block": 16, "inner_per_step": 16}


def select_compose(
    logits: Tensor,
    maxima: Tensor,
    x: Tensor,
    bank: AtomBank,
    static: Tensor,
    options: FfnOptions,
    outputs: LayerOutputs = OUTPUT_ONLY,
) -> Tensor:
    """static [B, d] + the composition of each token's k best atoms, in x's dtype.

    logits and maxima from `ffn_in.router_logits`; x [B, d]; the bank's u, v [atoms · max(rank, 1), d] and gamma float32
    [d] or [1]. options.rank: 0 for DSC; otherwise rows per adapter, weighed by the softmax of what was picked.
    outputs: what was picked is written to what there is of these.
    """
    logits, atoms, groups, scalar = checked(logits, maxima, x, bank, options)
    batch, d = x.shape
    check("static", static, (batch, d))
    out = torch.empty(batch, d, dtype=x.dtype, device=x.device)
    if batch:
        select_compose_tokens[(batch,)](
            *(logits, maxima, x.contiguous(), bank.u, bank.v, bank.gamma, static.contiguous(), out, *traced(outputs)),
            *(atoms, groups, options.eps, None, None, None, None, batch),
            **blocks(options.k, groups, d, options.rank),
            **ALONE,
            softmax=options.rank > 0,
            scalar_gamma=scalar,
            **chain(),
        )
    return out


def compose_beside(
    logits: Tensor,
    maxima: Tensor,
    x: Tensor,
    bank: AtomBank,
    hidden: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    options: FfnOptions,
    outputs: LayerOutputs = OUTPUT_ONLY,
) -> Tensor:
    """hidden W_2ᵀ + the composition, in parts whose sum it is: float32 [parts, B, d]; the rest as `select_compose`.

    hidden [B, H] and down [d, H] in x's dtype.
    """
    logits, atoms, groups, scalar = checked(logits, maxima, x, bank, options)
    (batch, d), inner = x.shape, hidden.shape[1]
    check("hidden", hidden, (batch, inner), x.dtype)
    check("down", down, (d, inner), x.dtype)
    meta = beside_blocks(options.k, groups, d, options.rank, batch, inner, x.dtype)
    splits = meta["splits"]
    parts = torch.empty(splits + 1, batch, d, dtype=torch.float32, device=x.device)
    if batch:
        programs = triton.cdiv(batch, meta["tokens_per_block"]) * triton.cdiv(d, meta["rows_per_block"]) * splits
        select_compose_tokens[(batch + programs,)](
            *(logits, maxima, x.contiguous(), bank.u, bank.v, bank.gamma, None, parts[splits], *traced(outputs)),
            *(atoms, groups, options.eps, hidden, down, down_bias, parts, batch),
            **meta,
            softmax=options.rank > 0,
            scalar_gamma=scalar,
            **chain(),
        )
    return parts


def traced(outputs: LayerOutputs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return outputs.picks, outputs.weights, outputs.signal


def checked(
    logits: Tensor, maxima: Tensor, x: Tensor, bank: AtomBank, options: FfnOptions
) -> tuple[Tensor, int, int, bool]:
    """Logits as the kernel takes them, how many atoms and groups, and whether gamma is one number."""
    logits, atoms, groups = prepare_logits(logits, maxima, options.k)
    batch, d = x.shape
    rows = atoms * max(options.rank, 1)
    check("logits", logits, (batch, logits.shape[1]), torch.float32)
    for name, tensor, length in (("x", x, batch), ("u", bank.u, rows), ("v", bank.v, rows)):
        assert isinstance(tensor, Tensor)
        check(name, tensor, (length, d))
    check("gamma", bank.gamma, (bank.gamma.numel(),), torch.float32)
    if bank.gamma.numel() not in (1, d):
        raise ValueError(f"gamma has {bank.gamma.numel()} values; expected 1 or {d}")
    return logits, atoms, groups, bank.gamma.numel() == 1
