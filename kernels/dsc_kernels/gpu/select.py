"""Exact top-K of a token from its logits and the maxima of 16-atom groups, and the coefficients of what was picked."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dsc_kernels.gpu.arithmetic import EMPTY, follow, key_index, key_value, largest, order_key, softplus, tanh_positive
from dsc_kernels.gpu.compiler import Meta, chain, check, kernel, power_of_2
from dsc_kernels.gpu.ffn_in import GROUP
from dsc_kernels.weights import OUTPUT_ONLY, LayerOutputs

MAX_PICKS = 64


@kernel
def select_atoms(
    logits: tl.tensor,
    maxima: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    k: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    groups_width: tl.constexpr,
    softmax: tl.constexpr,
) -> tl.tensor:
    """Atoms, coefficients [width ≥ k] (0 behind the k-th) and signal of the token whose rows begin at these pointers.

    The k best groups by (maximum descending, lowest id) hold the k best atoms: for an atom elsewhere there are k groups
    each with an atom before it in the order (logit descending, index ascending).
    """
    at = tl.arange(0, groups_width)
    best = tl.load(maxima + at, mask=at < groups, other=0.0)
    chosen = largest(order_key(best, at, at < groups), k, width)
    atom = key_index(chosen)[:, None] * group + tl.arange(0, group)[None, :]
    inside = (chosen != EMPTY)[:, None] & (atom < atoms)
    # What is loaded behind the last atom is not used; a mask by atom would break up the wide loads
    loaded = tl.load(logits + atom, mask=(chosen != EMPTY)[:, None], other=0.0)
    candidates = order_key(loaded, atom, inside)
    keys = largest(tl.reshape(candidates, (width * group,)), k, width)
    picked = tl.arange(0, width) < k
    values = key_value(keys)
    if softmax:
        powers = tl.where(picked, tl.exp(values - tl.max(tl.where(picked, values, float("-inf")), 0)), 0.0)
        weights = powers / tl.sum(powers, 0)
        signal = 0.0
    else:
        phi = tl.where(picked, softplus(values), 0.0)
        signal = tl.sum(phi, 0)
        weights = phi / (signal + eps) * tanh_positive(signal)
    return key_index(keys), weights, signal


@kernel
def select_tokens(
    logits: tl.tensor,
    maxima: tl.tensor,
    picks: tl.tensor,
    coefficients: tl.tensor,
    signals: tl.tensor,
    atoms: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    k: tl.constexpr,
    width: tl.constexpr,
    group: tl.constexpr,
    groups_width: tl.constexpr,
    softmax: tl.constexpr,
    chained: tl.constexpr = False,
) -> None:
    """One token: grid (batch,)."""
    follow(chained)
    token = tl.program_id(0).to(tl.int64)
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
    rank = tl.arange(0, width)
    tl.store(picks + token * k + rank, atom, mask=rank < k)
    tl.store(coefficients + token * k + rank, weights, mask=rank < k)
    tl.store(signals + token, signal)


def sizes(k: int, groups: int) -> Meta:
    """Vector widths of a selection."""
    width = power_of_2(k)
    return {"k": k, "width": width, "group": GROUP, "groups_width": power_of_2(groups, width)}


def blocks(k: int, groups: int) -> Meta:
    """Widths, and warps: few for few picks, since the network's widest steps go across them."""
    return {**sizes(k, groups), "num_warps": 1 if k <= 4 else 4 if k <= 16 else 8}


def prepare_logits(logits: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, int, int]:
    """Logits with rows of whole groups, as the router leaves them, and how many atoms and groups there are.

    Raises ValueError where tensors or k do not fit.
    """
    batch, atoms = logits.shape
    groups = -(-atoms // GROUP)
    check("logits", logits, (batch, atoms), torch.float32)
    check("maxima", maxima, (batch, groups), torch.float32)
    if not 1 <= k <= min(atoms, MAX_PICKS):
        raise ValueError(f"k is {k}; it must be between 1 and {min(atoms, MAX_PICKS)}")
    if logits.stride() != (groups * GROUP, 1):
        logits = torch.nn.functional.pad(logits, (0, groups * GROUP - atoms))
    return logits, atoms, groups


def select(
    logits: Tensor, maxima: Tensor, k: int, eps: float, softmax: bool = False, outputs: LayerOutputs = OUTPUT_ONLY
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row, by (logit descending, index ascending), NaN last, from `ffn_in.router_logits`.

    Returns atoms int32 [B, k], coefficients float32 [B, k] and the signal S [B]; with `softmax` (a mixture of LoRAs)
    the coefficients are the softmax of what was picked, and the signal is 0. They are written to what there is of
    `outputs`.
    """
    logits, atoms, groups = prepare_logits(logits, maxima, k)
    batch = logits.shape[0]
    picks = room(outputs.picks, torch.int32, logits, batch, k)
    coefficients = room(outputs.weights, torch.float32, logits, batch, k)
    signals = room(outputs.signal, torch.float32, logits, batch)
    if batch:
        select_tokens[(batch,)](
            *(logits, maxima.contiguous(), picks, coefficients, signals, atoms, groups, eps),
            **blocks(k, groups),
            softmax=softmax,
            **chain(),
        )
    return picks, coefficients, signals


def room(given: Tensor | None, dtype: torch.dtype, like: Tensor, *shape: int) -> Tensor:
    """The first rows of what is given, or a tensor of its own."""
    if given is None:
        return torch.empty(*shape, dtype=dtype, device=like.device)
    return given[: shape[0]]
