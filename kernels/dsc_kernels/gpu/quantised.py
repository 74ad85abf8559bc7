"""Products of a few tokens with weights of 4 and 8 bits: levels become numbers in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsc_kernels.dequantised import wide_product
from dsc_kernels.gpu.arithmetic import follow
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, stages
from dsc_kernels.quantised import QuantisedWeight, Weight

FEW = 64  # tokens up to which weights are read once and little else; beyond, torch's product of the numbers is faster


@kernel
def multiply_levels(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    minimums: tl.tensor,
    out: tl.tensor,
    batch: tl.tensor,
    outputs: tl.tensor,
    d: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    tokens_per_block: tl.constexpr,
    outputs_per_block: tl.constexpr,
    bytes_per_step: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One tile of out [batch, outputs] float32: grid (⌈batch / tokens⌉, ⌈outputs / outputs per block⌉).

    In 4 bits a byte holds an even input's level and the odd one's behind it: two products with every other input.
    """
    follow(chained)
    per_byte: tl.constexpr = 8 // bits
    row_bytes: tl.constexpr = (d + per_byte - 1) // per_byte
    groups: tl.constexpr = (d + group - 1) // group
    token = (tl.program_id(0) * tokens_per_block + tl.arange(0, tokens_per_block)).to(tl.int64)
    output = (tl.program_id(1) * outputs_per_block + tl.arange(0, outputs_per_block)).to(tl.int64)
    step = tl.arange(0, bytes_per_step)
    is_token, is_output = token < batch, output < outputs
    sums = tl.zeros((tokens_per_block, outputs_per_block), tl.float32)
    for start in range(0, row_bytes, bytes_per_step):
        at = start + step
        inside = (at < row_bytes)[:, None] & is_output[None, :]
        levels = tl.load(values + output[None, :] * row_bytes + at[:, None], mask=inside, other=0)
        first = at * per_byte
        of_group = output[None, :] * groups + (first // group)[:, None]
        scale = tl.load(scales + of_group, mask=inside, other=0.0).to(tl.float32)
        offset = tl.zeros((bytes_per_step, outputs_per_block), tl.float32)
        if minimums is not None:
            offset = tl.load(minimums + of_group, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(per_byte):
            level = levels
            if bits == 4:
                level = (levels >> (4 * part)) & 15
            weight = (level.to(tl.float32) * scale + offset).to(x.dtype.element_ty)
            is_input = is_token[:, None] & (first + part < d)[None, :]
            tile = tl.load(x + token[:, None] * d + (first + part)[None, :], mask=is_input, other=0.0)
            sums = tl.dot(tile, weight, sums, input_precision="ieee")
    tl.store(out + token[:, None] * outputs + output[None, :], sums, mask=is_token[:, None] & is_output[None, :])


def blocks(batch: int) -> Meta:
    """Tile sizes: narrow ones, so that reading the rows fills the GPU."""
    tiles = {"tokens_per_block": 16 if batch <= 16 else 32, "outputs_per_block": 32, "bytes_per_step": 64}
    return {**tiles, "num_warps": 4, "num_stages": stages(3)}


def multiply(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """x Wᵀ in float32, compensation included: x [B, d] → [B, n]. Levels become numbers of x's dtype."""
    batch, d = x.shape
    n = weight.shape[0]
    check("x", x, (batch, weight.shape[1]), weight.dtype)
    out = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    if batch:
        meta = blocks(batch)
        grid = (triton.cdiv(batch, meta["tokens_per_block"]), triton.cdiv(n, meta["outputs_per_block"]))
        multiply_levels[grid](
            *(x.contiguous(), weight.values, weight.scales, weight.minimums, out, batch, n),
            d=d,
            bits=weight.bits,
            group=weight.group,
            **meta,
            **chain(),
        )
    if weight.compensation is not None:
        left, right = (side.to(x.dtype) for side in weight.compensation)
        out += (x @ right.T @ left.T).float()
    return out


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in x's dtype: x [B, d] → [B, n]."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    y = float_product(x, weight)
    return (y if bias is None else y + bias).to(x.dtype)


def float_product(x: Tensor, weight: Weight) -> Tensor:
    """The same in float32, without a bias."""
    if isinstance(weight, Tensor) or x.shape[0] > FEW:
        return wide_product(x, weight)
    return multiply(x, weight)
