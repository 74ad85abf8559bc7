"""Tokens drawn by their logits, and ordered by what they pick."""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels.native.dispatch import threads
from dsc_kernels.native.extension import kernels
from dsc_kernels.native.tensors import address, check


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """A token id int64 [R] for each row of float32 logits [R, V], without sorting a row.

    temperature float32 [R], 0 for the most likely token; top_k int64 [R] and top_p float64 [R], V and 1 for no limit;
    min_p float32 [R]; u float64 [R] in [0, 1). Rows without a finite largest logit are drawn fairly among its equals.
    """
    rows, vocabulary = logits.shape
    columns = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "u": u}
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float32, torch.float64)
    check("logits", logits, (rows, max(vocabulary, 1)), torch.float32)
    for (name, column), dtype in zip(columns.items(), dtypes, strict=True):
        check(name, column, (rows,), dtype)
    out = torch.empty(rows, dtype=torch.int64)
    logits = logits.contiguous()
    ordered = [column.contiguous() for column in columns.values()]
    if rows:
        temperature, top_k, top_p, min_p, u = ordered
        kernels.sample(
            logits=logits.data_ptr(),
            temperature=temperature.data_ptr(),
            top_k=top_k.data_ptr(),
            top_p=top_p.data_ptr(),
            min_p=min_p.data_ptr(),
            u=u.data_ptr(),
            out=out.data_ptr(),
            batch=rows,
            vocabulary=vocabulary,
            threads=threads(),
        )
    return out


def min_hash_order(picks: Tensor) -> Tensor:
    """The order int32 [B] of tokens with atoms `picks` [B, K]; see `grouping.min_hash_order`."""
    picks = picks.to(torch.int32).contiguous()
    batch, k = picks.shape
    order = torch.empty(batch, dtype=torch.int32)
    kernels.min_hash_order(picks=picks.data_ptr(), batch=batch, k=k, order=order.data_ptr())
    return order


def tile_unions(picks: Tensor, order: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """The different atoms int32 [n] of each tile and their offsets int64 [tiles + 1]; see `grouping.tiles`."""
    picks = picks.to(torch.int32).contiguous()
    order = None if order is None else order.to(torch.int32).contiguous()
    batch, k = picks.shape
    atoms = torch.empty(batch * k, dtype=torch.int32)
    offsets = torch.empty(-(-batch // tile) + 1, dtype=torch.int64)
    kernels.tile_unions(
        picks=picks.data_ptr(),
        order=address(order),
        batch=batch,
        k=k,
        tile=min(tile, max(batch, 1)),
        atoms=atoms.data_ptr(),
        offsets=offsets.data_ptr(),
    )
    return atoms[: int(offsets[-1])], offsets
