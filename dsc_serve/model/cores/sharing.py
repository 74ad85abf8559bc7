"""From LoRAs to a basis that they share and a core each, and what that leaves out, exactly.

Shapes: W [out, in], an update ΔW = u diag(σ) v of rank r; a pair of k rows and columns. All of it is in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsc_kernels.weights import LowRank, Pair
from dsc_serve.files import CheckpointError
from dsc_serve.model.canonical import CanonicalForm, canonical
from dsc_serve.model.cores.files import Certified
from dsc_serve.model.peft.tensors import Matrices

SMALLEST = 1e-7  # of the largest singular value: directions of less are rounding
RIDGE = 1e-3  # of the mean second moment of inputs, which is added to each: nothing is divided by what was never seen

Updates = Mapping[str, LowRank]  # of an adapter, by module
Moments = Mapping[str, Tensor]  # by module E[x xᵀ] of its inputs, float64 [in, in]


@dataclass(frozen=True)
class SharedAdapter:
    """An adapter on a basis."""

    cores: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Matrices] = field(default_factory=dict)  # modules that are not on it, as they were
    certificate: dict[str, Certified] = field(default_factory=dict)  # of all modules

    @property
    def nbytes(self) -> int:
        matrices = sum(one.down.nbytes + one.up.nbytes for one in self.own.values())
        return matrices + sum(core.nbytes for core in self.cores.values())


def common_basis(adapters: Mapping[str, Updates], rank: int, moments: Moments | None = None) -> dict[str, Pair]:
    """By module the k ≤ rank directions of inputs, and of outputs, in which the adapters' updates are largest.

    They are the first singular vectors of all updates below each other, and of all beside each other. moments: of
    inputs as the base sees them; updates are then as large as what they add to these.
    Raises CheckpointError where adapters are of bases of other shapes, or where all updates are 0.
    """
    pairs = {}
    for name in dict.fromkeys(name for own in adapters.values() for name in own):
        having = {adapter: canonical(own[name]) for adapter, own in adapters.items() if name in own}
        check_alike(name, having)
        root = None if moments is None else square_root(moments[name])
        rights, lefts = [], []
        for form in having.values():
            right = form.sigma[:, None] * form.v if root is None else form.sigma[:, None] * form.v @ root[0]
            a, s, _ = torch.linalg.svd(right, full_matrices=False)
            rights.append(right)
            lefts.append((form.u @ a * s).T)
        down, up = leading(torch.cat(rights), rank), leading(torch.cat(lefts), rank)
        if len(down):
            down = down if root is None else down @ root[1]
            pairs[name] = Pair(down.float(), up.T.float().contiguous())
    if not pairs:
        raise CheckpointError("all updates of the adapters are 0; there is no basis of them")
    return pairs


def check_alike(name: str, having: Mapping[str, CanonicalForm]) -> None:
    """Raises CheckpointError."""
    shapes = {adapter: (form.u.shape[0], form.v.shape[1]) for adapter, form in having.items()}
    if len(set(shapes.values())) > 1:
        (first, one), (other, two) = next(
            ((a, x), (b, y)) for a, x in shapes.items() for b, y in shapes.items() if x != y
        )
        what = f"is {list(one)} of {first!r} and {list(two)} of {other!r}"
        raise CheckpointError(f"module {name} {what}; adapters that share have one base")


def leading(rows: Tensor, count: int) -> Tensor:
    """The first right singular vectors [k, d] of rows [n, d], at most `count`, and none of rounding alone."""
    if rows.shape[0] > rows.shape[1]:
        rows = torch.linalg.qr(rows).R
    v: Tensor
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    return v[: min(count, int((s > SMALLEST * s[0]).sum()) if float(s[0]) > 0 else 0)]


def square_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment [d, d], and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean()
    root = values.sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def projected(
    updates: Updates, pairs: Mapping[str, Pair], max_error: float | None = None, moments: Moments | None = None
) -> SharedAdapter:
    """An adapter's updates on a basis, each as near as its pair permits; with moments, near on such inputs.

    max_error: the share of an update's norm beyond which its module keeps what it has, as does one of which the basis
    has nothing. Raises CheckpointError where a pair is of a base of another shape.
    """
    found = SharedAdapter()
    for name, update in updates.items():
        form = canonical(update)
        norm, pair = form.norm, pairs.get(name)
        if norm == 0:
            continue
        if pair is not None:
            core = core_of(name, form, pair, None if moments is None else moments[name])
            told = Certified(norm, left_out(form, pair, core))
            if max_error is None or told.share <= max_error:
                found.cores[name], found.certificate[name] = core, told
                continue
        found.own[name] = Matrices(*form.kept(max(1, int((form.sigma > SMALLEST * norm).sum()))))
        found.certificate[name] = Certified(norm, 0.0)
    return found


def core_of(name: str, form: CanonicalForm, pair: Pair, moment: Tensor | None) -> Tensor:
    """float32 [rank, inner]. Raises CheckpointError."""
    down, up = pair.down.double(), pair.up.double()
    if (up.shape[0], down.shape[1]) != (form.u.shape[0], form.v.shape[1]):
        given, own = [up.shape[0], down.shape[1]], [form.u.shape[0], form.v.shape[1]]
        raise CheckpointError(f"module {name} is {own}; the basis is of a base where it is {given}")
    v = form.v
    if moment is not None:
        root, _ = square_root(moment)
        v, down = v @ root, down @ root
    left: Tensor = torch.linalg.lstsq(up, form.u * form.sigma).solution  # [rank, r]
    right: Tensor = torch.linalg.lstsq(down.T, v.T).solution.T  # [r, inner]
    return (left @ right).float()


def left_out(form: CanonicalForm, pair: Pair, core: Tensor) -> float:
    """‖ΔW − up core down‖₂, by two thin QRs: no matrix of the base's size is ever made."""
    left = torch.cat([form.u * form.sigma, -pair.up.double() @ core.double()], 1)
    right = torch.cat([form.v, pair.down.double()]).T
    inner = torch.linalg.qr(left).R @ torch.linalg.qr(right).R.T
    return float(torch.linalg.matrix_norm(inner, 2))


def worst(adapters: Sequence[SharedAdapter]) -> float:
    """The largest share that is left out of any update."""
    return max((own.share for one in adapters for own in one.certificate.values()), default=0.0)
