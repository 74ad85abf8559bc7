"""The paper's training terms: the script's own figures, and each written a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_models import small_config
from torch import Tensor

from dsc_serve.model.checkpoint import load_tensors, weight_files
from dsc_serve.model.config import load_config
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.train import losses
from dsc_serve.train.ffn import TRAINED, Pass
from dsc_serve.train.settings import LossSettings

GOLDEN = {"aux": "load", "budget": "budget", "coh": "frame", "z_loss": "z"}


def layer_tensors(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{i}.mlp."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("layer", [0, 1])
def test_every_term_is_the_scripts(
    layer: int, golden_folder: Callable[[str], Path], golden_io: Callable[[str], dict[str, Tensor]]
) -> None:
    folder, io = golden_folder("dsc"), golden_io("dsc")
    own = layer_tensors(load_tensors(weight_files(folder)), layer)
    x = io[f"blocks.{layer}.ffn.in"].flatten(0, 1)
    y, trace = TRAINED["dsc"](load_config(folder), own, x, Pass(LossSettings()))
    torch.testing.assert_close(y, io[f"blocks.{layer}.ffn.out"].flatten(0, 1), atol=1e-4, rtol=0)
    for theirs, ours in GOLDEN.items():
        want = io[f"blocks.{layer}.ffn.loss.{theirs}"].squeeze()
        torch.testing.assert_close(trace.terms[ours], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["standard_moe", "dense"])
def test_the_baselines_outputs_are_the_scripts(
    method: str, golden_folder: Callable[[str], Path], golden_io: Callable[[str], dict[str, Tensor]]
) -> None:
    folder, io = golden_folder(method), golden_io(method)
    config = load_config(folder)
    own = layer_tensors(load_tensors(weight_files(folder)), 0)
    x = io["blocks.0.ffn.in"].flatten(0, 1)
    y, _ = TRAINED[config.ffn.kind](config, own, x, Pass(LossSettings(), training=False))
    torch.testing.assert_close(y, io["blocks.0.ffn.out"].flatten(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tau", [20.0, 1.0])
@pytest.mark.parametrize("z_of", ["raw", "clamped"])
def test_load_and_z_with_their_gradients(tau: float, z_of: str) -> None:
    """With τ = 1 some logits are clamped, with 20 none: two code paths, one formula."""
    logits = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    r = logits.clamp(-tau, tau)
    p = r.exp() / r.exp().sum(1, keepdim=True)
    z = (logits if z_of == "raw" else r).exp().sum(1).log().square().mean()
    want = torch.stack((9 * p.mean(0).square().sum(), z))
    got = torch.stack(losses.load_and_z(logits, tau, z_of))
    torch.testing.assert_close(got, want)
    factors = torch.tensor([0.7, -1.3], dtype=torch.float64)
    (want_grad,) = torch.autograd.grad(want @ factors, logits)
    (got_grad,) = torch.autograd.grad(got @ factors, logits)
    torch.testing.assert_close(got_grad, want_grad)


def test_frame_is_the_sum_over_pairs() -> None:
    rows = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = sum(float(rows[i] @ rows[j]) ** 2 for i in range(7) for j in range(7) if i != j)
    assert float(losses.frame(rows)) == pytest.approx(want)


def test_the_frame_factor_carries_the_term_for_a_whole_step() -> None:
    config = small_config("dsc")
    own = {k: torch.randn(s) for k, s in DscFfn.shapes(config).items()}
    x = torch.randn(5, config.hidden_size)
    once, twice, none = (
        TRAINED["dsc"](config, own, x, Pass(LossSettings(), frame=f))[1].terms for f in (1.0, 2.0, 0.0)
    )
    assert float(twice["frame"]) == pytest.approx(2 * float(once["frame"]))
    assert "frame" not in none


def test_budget_pushes_only_a_signal_below_its_floor() -> None:
    assert float(losses.budget(torch.tensor([0.2, 0.6]), 1.0)) == pytest.approx(0.36)
    assert float(losses.budget(torch.tensor([0.2, 2.6]), 1.0)) == 0.0


def test_a_mixtures_load_counts_picks() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    picked = torch.tensor([[0, 1], [1, 0]])
    assert float(losses.mixture_load(probabilities, picked)) == pytest.approx(3 / 4 * (0.6 * 2 + 1.1 * 2))
