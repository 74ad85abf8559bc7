"""The reference script's own outputs on its own weights, for all three methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_models import METHODS
from torch import Tensor

from dsc_kernels import native
from dsc_serve import LLM, SamplingParams
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.ffn.dsc import DscFfn

Golden = Callable[[str], dict[str, Tensor]]
Folder = Callable[[str], Path]
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_every_ffn_matches(method: str, golden_folder: Folder, golden_io: Golden) -> None:
    io = golden_io(method)
    model = load_model(golden_folder(method), "float32", torch.device("cpu"))
    for i, layer in enumerate(model.layers):
        x, want = (io[f"blocks.{i}.ffn.{end}"].flatten(0, 1) for end in ("in", "out"))
        torch.testing.assert_close(layer.ffn(x), want, **TOLERANCE)


def test_routing_matches(golden_folder: Folder, golden_io: Golden) -> None:
    io = golden_io("dsc")
    model = load_model(golden_folder("dsc"), "float32", torch.device("cpu"))
    for i, layer in enumerate(model.layers):
        assert isinstance(layer.ffn, DscFfn)
        x = io[f"blocks.{i}.ffn.in"].flatten(0, 1)
        _, (atoms, weights, signal) = layer.ffn.routed(x)
        order, want_order = atoms.argsort(dim=1), io[f"blocks.{i}.ffn.atoms"].argsort(dim=1)
        want_atoms = io[f"blocks.{i}.ffn.atoms"].gather(1, want_order)
        torch.testing.assert_close(atoms.gather(1, order), want_atoms.to(atoms.dtype), rtol=0, atol=0)
        want_weights = io[f"blocks.{i}.ffn.coefficients"].gather(1, want_order)
        torch.testing.assert_close(weights.gather(1, order), want_weights, **TOLERANCE)
        torch.testing.assert_close(signal, io[f"blocks.{i}.ffn.signal"].flatten(), **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_greedy_ids_match(method: str, chunk: int, golden_folder: Folder, golden_io: Golden) -> None:
    io = golden_io(method)
    greedy = io["greedy_ids"]
    half = greedy.shape[1] // 2
    prompts, want = greedy[:, :half].tolist(), greedy[:, half:].tolist()
    params = SamplingParams(temperature=0, max_tokens=half)
    with LLM(str(golden_folder(method)), dtype="float32", step_tokens=chunk, max_running=min(chunk, 8)) as llm:
        for got, logits in zip(llm.logits(io["input_ids"].tolist()), io["logits"], strict=True):
            torch.testing.assert_close(got, logits, **TOLERANCE)
        together = [output.token_ids for output in llm.generate(prompts, params)]
        alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == want
    assert alone == want


@pytest.mark.parametrize("kernels", ["plain", *native.available()])
@pytest.mark.parametrize("method", METHODS)
def test_every_kernel_path_matches(method: str, kernels: str, golden_folder: Folder, golden_io: Golden) -> None:
    """Plain torch too: what serves where the package was installed without a compiler."""
    io = golden_io(method)
    half = io["greedy_ids"].shape[1] // 2
    with LLM(str(golden_folder(method)), dtype="float32", step_tokens=11, max_running=8, kernels=kernels) as llm:
        for got, logits in zip(llm.logits(io["input_ids"].tolist()), io["logits"], strict=True):
            torch.testing.assert_close(got, logits, **TOLERANCE)
        outputs = llm.generate(io["greedy_ids"][:, :half].tolist(), SamplingParams(temperature=0, max_tokens=half))
    native.use("auto")
    assert [output.token_ids for output in outputs] == io["greedy_ids"][:, half:].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_greedy_ids_survive_preemption(method: str, golden_folder: Folder, golden_io: Golden) -> None:
    greedy = golden_io(method)["greedy_ids"]
    half = greedy.shape[1] // 2
    params = SamplingParams(temperature=0, max_tokens=half)
    with LLM(str(golden_folder(method)), dtype="float32", kv_tokens=48, block_size=4) as llm:
        outputs = llm.generate(greedy[:, :half].tolist() * 3, params)
        assert llm.engine.scheduler.preemptions > 0
        assert llm.engine.scheduler.fault() is None
    assert [output.token_ids for output in outputs] == greedy[:, half:].tolist() * 3
