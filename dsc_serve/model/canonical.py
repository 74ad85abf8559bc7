"""Low-rank updates by their singular vectors: how strong they are, and what leaving some out costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_kernels.weights import LowRank


@dataclass(frozen=True)
class CanonicalForm:
    """ΔW = u diag(sigma) v, float64: u [out, r] and v [r, in] orthonormal, sigma [r] falling, the scale within it."""

    u: Tensor
    sigma: Tensor
    v: Tensor

    @property
    def norm(self) -> float:
        """‖ΔW‖₂, the most that the update can lengthen an input."""
        return self.left_out(0)

    def left_out(self, atoms: int) -> float:
        """‖ΔW − ΔW_k‖₂ where only the k strongest atoms stay: exactly the next singular value."""
        return float(self.sigma[atoms]) if atoms < len(self.sigma) else 0.0

    def kept(self, atoms: int) -> tuple[Tensor, Tensor]:
        """down [k, in] and up [out, k], float32, with rows of zeros where there are fewer atoms."""
        down = torch.zeros(atoms, self.v.shape[1])
        up = torch.zeros(self.u.shape[0], atoms)
        count = min(atoms, len(self.sigma))
        down[:count] = self.v[:count].float()
        up[:, :count] = (self.u[:, :count] * self.sigma[:count]).float()
        return down, up


def canonical(update: LowRank) -> CanonicalForm:
    """By two thin QRs and the SVD of a small matrix: no matrix of the base's size is ever made."""
    up = update.up.double() * update.coefficients.double()
    q_up, r_up = torch.linalg.qr(up if update.core is None else up @ update.core.double())
    q_down, r_down = torch.linalg.qr(update.down.double().T)
    u, sigma, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return CanonicalForm(q_up @ u, sigma, v @ q_down.T)
