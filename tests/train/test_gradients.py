"""Hand-written backward passes against finite differences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.naive_decoder import logits as naive_logits
from support.small_models import small_config, wide_tensors
from torch.utils.flop_counter import FlopCounterMode

from dsc_serve.train.adapt.network import AdaptedNetwork
from dsc_serve.train.ffn import Pass
from dsc_serve.train.functions import ACTIVATIONS, causal_attention, compose, gated, head_loss, rms_norm, rotated
from dsc_serve.train.network import Network
from dsc_serve.train.settings import LossSettings

CPU = torch.device("cpu")


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize(("length", "block"), [(5, 128), (7, 3), (8, 4)])
def test_attention(length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.train.functions.QUERY_BLOCK", block)
    q, k, v = (wide(2, length, 4, seed=s) for s in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(causal_attention(q, k, v), want)
    assert torch.autograd.gradcheck(causal_attention, (q, k, v))


def test_rotation() -> None:
    x, angles = wide(2, 3, 5, 8).transpose(1, 2), wide(3, 4, seed=1).detach()
    cos, sin = angles.cos(), angles.sin()
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    want = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotated(x, cos, sin), want)
    assert torch.autograd.gradcheck(lambda one: rotated(one, cos, sin), (x,))


def test_rms_norm() -> None:
    x, weight = wide(2, 3, 6), wide(6, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 0.1), torch.rms_norm(x, (6,), weight, 0.1))
    assert torch.autograd.gradcheck(lambda *args: rms_norm(*args, 0.1), (x, weight))
    assert torch.autograd.gradcheck(lambda one: rms_norm(one, weight.detach(), 0.1), (x,))


def test_rms_norms_of_bfloat16_round_once() -> None:
    x = (30 * wide(4, 576)).detach().bfloat16().requires_grad_()
    weight, grads = wide(576, seed=1).detach().bfloat16(), wide(4, 576, seed=2).detach().bfloat16()
    y = rms_norm(x, weight, 1e-5)
    y.backward(grads)
    exact = x.detach().double().requires_grad_()
    want = torch.rms_norm(exact, (576,), weight.double(), 1e-5)
    want.backward(grads.double())
    assert x.grad is not None and exact.grad is not None
    for own, other in ((y, want), (x.grad, exact.grad)):
        assert (own.double() - other).abs().max() <= 2**-8 * other.abs().max()
        assert (own != other.to(own.dtype)).float().mean() < 0.01  # float32's own error, at halves


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str) -> None:
    x = wide(2, 3, 10)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(gated(x, activation), ACTIVATIONS[activation](gate) * up)
    assert torch.autograd.gradcheck(lambda one: gated(one, activation), (x,))


def test_composition() -> None:
    x, u, v, z = wide(4, 5), wide(7, 5, seed=1), wide(7, 5, seed=2), wide(4, 3, seed=3)
    picked = torch.tensor([[0, 3, 6], [1, 2, 3], [6, 5, 0], [2, 4, 1]])
    want = sum(((x * u[picked[:, j]]).sum(1) * z[:, j])[:, None] * v[picked[:, j]] for j in range(3))
    torch.testing.assert_close(compose(x, u, v, picked, z), want)
    assert torch.autograd.gradcheck(lambda *args: compose(args[0], args[1], args[2], picked, args[3]), (x, u, v, z))


def test_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.train.functions.HEAD_ROWS", 4)
    x, head, targets = wide(9, 5), wide(6, 5, seed=1), torch.tensor([0, 5, 2, 2, 1, 3, 4, 0, 5])
    torch.testing.assert_close(head_loss(x, head, targets), torch.nn.functional.cross_entropy(x @ head.T, targets))
    assert torch.autograd.gradcheck(lambda *args: head_loss(*args, targets), (x, head))


def test_a_look_at_the_loss_computes_no_gradient() -> None:
    x, head, targets = wide(9, 5), wide(6, 5, seed=1), torch.tensor([0, 5, 2, 2, 1, 3, 4, 0, 5])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head_loss(x, head, targets)
    assert counter.get_total_flops() == 2 * x.numel() * len(head)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "attention_output_bias": True, "num_key_value_heads": 1},
        {"mlp_gated": True, "hidden_act": "silu", "norm_type": "rmsnorm"},
        {"mlp_gated": True, "hidden_act": "gelu", "position_embedding_type": "learned"},
    ],
)
def test_a_frozen_networks_losses(changes: dict[str, Any]) -> None:
    """Of a base alone, and of updates of some of the modules that are multiplied at once."""
    config = small_config("dense", **changes)
    tensors = {name: tensor.double() for name, tensor in wide_tensors(config, seed=3).items()}
    network = AdaptedNetwork(config, tensors, 2.0, torch.float64, CPU)
    windows = torch.randint(0, config.vocab_size, (1, 1, 9), generator=torch.Generator().manual_seed(0))
    ids = windows.flatten().tolist()

    def expected(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(naive_logits(config, weights, ids[:-1]), windows[0, 0, 1:])

    torch.testing.assert_close(network.losses({}, windows)[0], expected(tensors))
    name = "model.layers.1.self_attn.k_proj.weight"
    out, into = tensors[name].shape
    down, up = wide(1, 2, into, seed=4).detach(), wide(1, out, 2, seed=5).detach()
    merged = {**tensors, name: tensors[name] + 2.0 * up[0] @ down[0]}
    torch.testing.assert_close(network.losses({(1, "k"): (down, up)}, windows)[0], expected(merged))


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "norm_type": "rmsnorm",
            "position_embedding_type": "learned",
            "mlp_gated": True,
            "hidden_act": "silu",
            "num_key_value_heads": 1,
            "attention_bias": True,
            "attention_output_bias": True,
            "tie_word_embeddings": False,
        },
    ],
    ids=["layernorm-rope-gelu-tied", "rmsnorm-learned-gated-grouped-untied-biased"],
)
def test_the_whole_networks_gradient(kind: str, changes: dict[str, Any]) -> None:
    """The loss with all terms along random directions through every tensor. Step sizes too small to flip a pick."""
    config = small_config(kind, **changes)
    network = Network(config, torch.float64, CPU)
    tensors = {n: t.double().requires_grad_() for n, t in wide_tensors(config, seed=3).items()}
    windows = torch.randint(0, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    mode = Pass(LossSettings(load=0.3, budget=0.2, frame=0.01, z=0.1, signal_floor=9.0), noise=7)

    def total(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        outcome = network(weights, windows, mode)
        return outcome.loss + outcome.terms

    grads = dict(zip(tensors, torch.autograd.grad(total(tensors), list(tensors.values())), strict=True))
    step = 1e-6
    with torch.no_grad():
        for seed, name in enumerate(tensors):
            direction = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(seed)).double()
            ends = [total({**tensors, name: tensors[name] + sign * step * direction}) for sign in (1, -1)]
            numeric = float(ends[0] - ends[1]) / (2 * step)
            assert float((grads[name] * direction).sum()) == pytest.approx(numeric, rel=2e-5, abs=2e-8), name


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_the_loss_is_that_of_the_plain_decoder(kind: str) -> None:
    config = small_config(kind)
    tensors = wide_tensors(config, seed=1)
    ids = torch.randint(0, config.vocab_size, (13,), generator=torch.Generator().manual_seed(2))
    want = torch.nn.functional.cross_entropy(naive_logits(config, tensors, ids[:-1].tolist()), ids[1:])
    network = Network(config, torch.float64, CPU)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    got = network(doubles, ids[None], Pass(LossSettings(), training=False)).loss
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
