"""Tenants of a bank in an engine: mixed with each other, LoRAs and the base, whatever becomes of their requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.small_models import small_config, wide_tensors
from support.tenants import as_tenant, random_tenant

from dsc_serve import LLM, SamplingParams
from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError
from dsc_serve.engine.tenants import overlap, overlaps
from dsc_serve.llm import RequestOutput
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.config import DscConfig
from dsc_serve.model.graft import graft
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.model.tenant import FILE, write_tenant
from dsc_serve.sampling_params import ALL_ATOMS

VOCABULARY = 67
PROMPTS = [[(37 * i * i + 11 * i + 5 + 7 * length) % VOCABULARY for i in range(length)] for length in (2, 11, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
NAMES = ["t0", "t1", "t2", "lora", None]
CLOSE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grafted model, three tenants and a LoRA of it, and each tenant's model by itself."""
    out = tmp_path_factory.mktemp("bank")
    config = small_config(
        "dense",
        mlp_gated=True,
        hidden_act="silu",
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    save_checkpoint(config, wide_tensors(config), out / "base")
    grafted = graft(out / "base", out / "model", 50, 3)
    source, ffn = open_source(out / "model"), grafted.ffn
    assert isinstance(ffn, DscConfig)
    tensors = dict(source.weights())
    for i in range(3):
        tenant = random_tenant(grafted, i, gamma=3.0)
        write_tenant(out / "adapters" / f"t{i}", tenant.bias, tenant.gamma, ffn.bank)
        save_checkpoint(*as_tenant(grafted, tensors, tenant), out / f"t{i}")
    generator = torch.Generator().manual_seed(1)
    modules = {
        own.name: Matrices(
            torch.randn(2, own.into, generator=generator), 0.2 * torch.randn(own.out, 2, generator=generator)
        )
        for own in Base(source.config, source.origin).modules.values()
    }
    write_adapter(out / "adapters" / "lora", "base", 2.0, modules)
    return out


def served(folder: Path, **settings: Any) -> LLM:
    settings = {"adapters": folder / "adapters", "max_running": 8, "dtype": "float32", **settings}
    return LLM(str(folder / "model"), threads=1, **settings)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str | None, list[list[int]]]:
    """Greedy tokens of each prompt: of tenants by their own models, of the base without a branch."""
    found: dict[str | None, list[list[int]]] = {}
    for name, model in (("t0", "t0"), ("t1", "t1"), ("t2", "t2"), (None, "base")):
        with LLM(str(folder / model), dtype="float32", threads=1) as llm:
            found[name] = tokens(llm.generate(PROMPTS, GREEDY))
    with LLM(str(folder / "model"), dtype="float32", threads=1, adapters=folder / "adapters") as llm:
        found["lora"] = tokens(llm.generate(PROMPTS, GREEDY, adapter="lora"))
    assert len({tuple(map(tuple, own)) for own in found.values()}) == 5, "they differ"
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_tokens": 8, "block_size": 4},
        {"block_size": 4, "kv_tokens": 120, "context": 60},
        {"prefix_cache": False, "policy": "affinity"},
        {"speculation": "auto", "policy": "fair"},
        {"router_precision": "int8-certified"},
        {"kernels": "plain", "step_tokens": 16},
        {"kernels": "avx2", "grouping": "always"},
    ],
    ids=["as it is", "chunks", "preempted", "affinity", "drafts", "screened", "plain", "grouped"],
)
def test_tenants_mixed_in_one_batch_get_what_each_gets_alone(
    settings: dict[str, Any], folder: Path, alone: dict[str | None, list[list[int]]]
) -> None:
    with served(folder, **settings) as llm:
        jobs = [(i, name) for name in NAMES for i in range(len(PROMPTS))]
        for _ in range(2):  # the second time prefixes are found
            order = sorted(jobs, key=lambda job: (7 * jobs.index(job)) % len(jobs))
            predicted = tuple(alone["t0"][0]) if "speculation" in settings else ()
            params = msgspec.structs.replace(GREEDY, prediction_token_ids=predicted)
            found = llm.generate([PROMPTS[i] for i, _ in order], params, adapter=[name for _, name in order])
            assert tokens(found) == [alone[name][i] for i, name in order]
        if settings.get("kv_tokens"):
            assert llm.engine.scheduler.preemptions > 0
        if settings.get("prefix_cache", True) and "kv_tokens" not in settings:
            assert llm.engine.scheduler.cached_tokens > 0


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_bases_in_fewer_bits_serve_tenants_too(bits: str, folder: Path) -> None:
    """Mixed with LoRAs and the base, as each tenant's own model in as many bits."""
    jobs = [(i, name) for name in NAMES for i in range(len(PROMPTS))]
    with served(folder, weights=bits) as llm:
        found = llm.logits([PROMPTS[i] for i, _ in jobs], adapter=[name for _, name in jobs])
        base = llm.logits(PROMPTS)
        lora = llm.logits(PROMPTS, adapter="lora")
    for model, names in (("t0", ["t0"]), ("t1", ["t1"]), ("t2", ["t2"]), ("base", [None])):
        with LLM(str(folder / model), dtype="float32", threads=1, weights=bits) as llm:
            want = llm.logits(PROMPTS)
        for (i, name), own in zip(jobs, found, strict=True):
            if name in names:
                # inputs are rounded to int8, so that what differs in a last bit may differ in a step
                assert (own - want[i]).norm() < 0.05 * want[i].norm()
                assert name is None or (own - base[i]).norm() > 0.1 * want[i].norm()
    for (i, name), own in zip(jobs, found, strict=True):
        assert name != "lora" or (own - lora[i]).norm() < 0.05 * own.norm() < (own - base[i]).norm()


def test_prefixes_are_shared_by_tenants_of_one_content_alone(folder: Path, tmp_path: Path) -> None:
    """By the digest of bias and scale, which the key of the cache has in it."""
    for name, origin in (("a", "t0"), ("b", "t0"), ("c", "t1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes((folder / "adapters" / origin / FILE).read_bytes())
    with served(folder, adapters=tmp_path, block_size=4) as llm:

        def cached(name: str | None) -> int:
            before = llm.engine.scheduler.cached_tokens
            llm.generate([PROMPTS[2]], GREEDY, adapter=name)
            return llm.engine.scheduler.cached_tokens - before

        assert [cached(name) for name in (None, "a", "b", "c", "a", None)] == [0, 0, 36, 0, 36, 36]


def test_what_is_asked_of_routing_is_the_tenants(folder: Path) -> None:
    with served(folder) as llm:
        params = msgspec.structs.replace(GREEDY, routing=3)
        base, tenant = llm.generate([PROMPTS[1]] * 2, params, adapter=[None, "t0"])
    assert base.routing is not None and tenant.routing is not None
    for own, picks in ((base, False), (tenant, True)):
        numbers = [np.frombuffer(own.routing.signal, np.float32), np.frombuffer(own.routing.coefficients, np.float32)]
        assert all((part > 0).all() == picks and part.any() == picks for part in numbers)


def test_a_tenant_composes_with_low_ranks_and_with_no_other_tenant(folder: Path) -> None:
    with served(folder) as llm:
        prompt = [PROMPTS[1]]
        base, tenant, lora = (llm.logits(prompt, adapter=name)[0] for name in (None, "t0", "lora"))
        for weights, want in [({"t0": 1, "lora": 0}, tenant), ({"t0": 0, "lora": 1}, lora), ({"t0": 0.0}, base)]:
            assert (llm.logits(prompt, adapter=weights)[0] - want).abs().max() < CLOSE
        both = llm.logits(prompt, adapter={"t0": 0.5, "lora": 0.5})[0]
        assert min(float((both - one).abs().max()) for one in (base, tenant, lora)) > 0.1
        with pytest.raises(BrokenAdapterError, match="t0 and t1 are tenants of a bank; a composition may have one"):
            llm.logits(prompt, adapter={"t0": 0.5, "t1": 0.5})
        product = AdapterChoice((("lora", 0.5), ("t1", 0.5)), "product of sums")
        with pytest.raises(BrokenAdapterError, match="t1 is a tenant of a bank and has no matrices; compose it by sum"):
            llm.logits(prompt, adapter=product)


def test_what_tenants_pick_is_told_of_each(folder: Path) -> None:
    with served(folder) as llm:
        assert llm.engine.routing is not None
        assert llm.engine.routing.tenant_report().tenants == []
        jobs = [name for name in NAMES for _ in range(3)]
        llm.generate(PROMPTS * 5, msgspec.structs.replace(GREEDY, max_tokens=16), adapter=jobs)
        report = llm.engine.routing.tenant_report()
        watched = llm.engine.routing.report()
    assert (report.layers, report.atoms, report.atoms_per_token) == ([0, 1], 50, 3) and len(report.bank) == 16
    found = {own.name: own for own in report.tenants}
    assert found.keys() == {"t0", "t1", "t2"}, "neither the base nor LoRAs pick anything"
    assert sum(own.tokens for own in report.tenants) == watched.tokens
    for i, own in enumerate(found[name] for name in ("t0", "t1", "t2")):
        gamma = random_tenant(open_source(folder / "model").config, i, gamma=3.0).gamma
        assert own.certificate == pytest.approx(gamma.abs().amax(1).tolist())
        assert all(0 < bound < most for bound, most in zip(own.bound, own.certificate, strict=True))
        assert all(3 <= count <= 50 for count in own.distinct) and own.signal > 0 and own.tokens > 0
        assert own.overlap.keys() == found.keys() - {own.name}
        assert all(0 <= part < 1 for part in own.overlap.values())
    assert found["t0"].overlap["t1"] == found["t1"].overlap["t0"]
    assert all(0 < shared <= 50 for shared in report.shared)


def test_no_tokens_dynamic_part_is_larger_than_its_bound(folder: Path) -> None:
    """‖ΔW‖₂ ≤ tanh(S) max |γ|, with ΔW spelt out of the atoms and coefficients that are told of each token."""
    source = open_source(folder / "model")
    weights, gamma = source.weights(), random_tenant(source.config, 0, gamma=3.0).gamma.double()
    with served(folder) as llm:
        (output,) = llm.generate([PROMPTS[2]], msgspec.structs.replace(GREEDY, routing=ALL_ATOMS), adapter="t0")
    assert output.routing is not None
    picked, coefficients, signals = (torch.from_numpy(own.copy()) for own in output.routing.arrays)
    nearest = 0.0
    for layer in range(2):
        u, v = (
            torch.nn.functional.normalize(weights[f"model.layers.{layer}.mlp.atoms_{side}"].double(), dim=1)
            for side in "uv"
        )
        for token in range(len(picked)):
            own = picked[token, layer].long()
            dynamic = gamma[layer, :, None] * (v[own].T * coefficients[token, layer].double()) @ u[own]
            norm = float(torch.linalg.matrix_norm(dynamic, 2))
            bound = float(signals[token, layer].double().tanh() * gamma[layer].abs().max())
            assert norm <= bound * (1 + 1e-6)
            nearest = max(nearest, norm / bound)
    assert nearest > 0.05, "and it is not a bound of something else"


def test_what_tenants_share_is_counted_as_sets_are() -> None:
    every = np.random.default_rng(0).random((9, 3, 40)) < np.linspace(0, 0.9, 9)[:, None, None]
    found = overlaps(every, 4)
    assert found.shape == (9, 4)
    for i, one in enumerate(every):
        for j, other in enumerate(every[:4]):
            want = [(a & b).sum() / max((a | b).sum(), 1) for a, b in zip(one, other, strict=True)]
            assert found[i, j] == pytest.approx(np.mean(want)) and overlap(one, other) == pytest.approx(np.mean(want))


def test_adapters_are_listed_as_tenants(folder: Path) -> None:
    with served(folder) as llm:
        adapters = llm.engine.arrivals.adapters
        assert adapters is not None
        llm.logits([PROMPTS[0]], adapter="t1")
        (info,) = [info for info in adapters.infos() if info.name == "t1"]
        assert (info.kind, info.rank, info.modules, info.nbytes) == ("dsc", 0, 2, 2 * (50 + 32) * 4)
        assert 0 < adapters.nbytes < 3 * info.nbytes


def test_hundreds_of_tenants_take_kilobytes_each(folder: Path, tmp_path: Path) -> None:
    """All in memory at once and mixed in steps, each with tokens of its own."""
    config, count = open_source(folder / "model").config, 200
    ffn = config.ffn
    assert isinstance(ffn, DscConfig)
    for i in range(count):
        tenant = random_tenant(config, i, gamma=3.0)
        write_tenant(tmp_path / f"t{i}", tenant.bias, tenant.gamma, ffn.bank)
    names = [f"t{i}" for i in range(count)]
    params = msgspec.structs.replace(GREEDY, max_tokens=6)
    with served(folder, adapters=tmp_path, max_running=64, kv_tokens=8192) as llm:
        first = tokens(llm.generate([PROMPTS[1]] * count, params, adapter=names))
        adapters = llm.engine.arrivals.adapters
        assert adapters is not None and adapters.in_memory == count
        assert adapters.nbytes <= count * (2 * (64 + 32) * 4 + 64), "biases lie in whole panels, bounds in one line"
        assert max(llm.engine.adapter_report.distinct.counts[4:]) > 0
        for i in (0, 77, 199):
            assert tokens(llm.generate([PROMPTS[1]], params, adapter=names[i])) == [first[i]]
    assert len({tuple(own) for own in first}) > count / 4
