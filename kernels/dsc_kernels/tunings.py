"""DSC layers whose tokens have biases and scales of their own, in plain torch: tenants of one bank in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_kernels import reference
from dsc_kernels.dequantised import dense
from dsc_kernels.picking import compose_add, select
from dsc_kernels.weights import Adapted, AdapterRun, AtomBank, FfnOptions, Router, Tuning

Tuned = tuple[AdapterRun, Tuning]


def tuned_runs(adapted: Adapted | None) -> list[Tuned]:
    """The runs whose adapters have something of their own in this layer's bank."""
    runs: Sequence[AdapterRun] = () if adapted is None else adapted.runs
    layer = 0 if adapted is None else adapted.layer
    return [(run, run.adapter.tunings[layer]) for run in runs if layer in run.adapter.tunings]


def tuned_layer(
    x: Tensor, static: Tensor, runs: Sequence[Tuned], router: Router, bank: AtomBank, options: FfnOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The static part [B, d] of x plus the dynamic one, atoms int64 [B, k], coefficients [B, k] and signal [B].

    In a silent layer only tokens of these runs are routed: all others pick nothing, which is told as the first atoms
    with coefficients of 0.
    """
    tokens, k = x.shape[0], options.k
    atoms = torch.arange(k, device=x.device).repeat(tokens, 1)
    weights, signal = (torch.zeros(*shape, device=x.device) for shape in ((tokens, k), (tokens,)))
    if options.silent and not runs:
        return static, atoms, weights, signal
    count = router.weight.shape[0]
    none = torch.zeros(count, device=x.device)
    biases = (none if router.bias is None else router.bias).float().expand(tokens, count).clone()
    gammas = bank.gamma.float().expand(tokens, x.shape[1]).clone()
    rows = torch.arange(tokens, device=x.device)
    for run, own in runs:
        part = slice(run.first, run.first + run.length)
        biases[part], gammas[part] = own.bias, own.gamma
    if options.silent:
        rows = torch.cat([rows[run.first : run.first + run.length] for run, _ in runs])
    picked = x[rows]
    logits = reference.router_logits(picked.float(), dense(router.weight, torch.float32), biases[rows], router.norm_eps)
    selected, own_atoms = select(logits, k, options.tau)
    own_weights, own_signal = reference.coefficients(selected, options.eps)
    atoms[rows], weights[rows], signal[rows] = own_atoms, own_weights, own_signal
    nothing = torch.zeros(picked.shape, device=x.device)
    dynamic = compose_add(nothing, picked, own_atoms, own_weights, bank.u, bank.v, gammas[rows])
    return static.float().index_add(0, rows, dynamic).to(x.dtype), atoms, weights, signal
