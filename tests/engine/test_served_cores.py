"""Cores on a shared basis served as the LoRAs that they were: mixed, in chunks, preempted, reloaded, composed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import apart
from support.shared_tenants import small_base, write_loras, write_shared

from dsc_serve import LLM, SamplingParams
from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError
from dsc_serve.engine.adapters import Adapters
from dsc_serve.model.cores.files import read_basis, write_cores

CLOSE = 3e-5  # of the largest logit
MARGIN = 4e-3  # between the two largest, of which the second is in no machine's rounding the first
NEW = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
PROMPTS = [[5, 9, 2], [(7 * i) % 61 for i in range(21)], [17]]
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `loras` (a, b, c and d, which shares nothing), and `shared`: a, b, c as cores, and d as it is."""
    folder = tmp_path_factory.mktemp("tenants")
    base = small_base(folder / "base")
    write_loras(base, folder / "loras", NAMES)
    write_loras(base, folder / "loras", ["d"], common=1)
    write_shared(folder / "loras", folder / "shared", NAMES)
    shutil.copytree(folder / "loras" / "d", folder / "shared" / "d")
    return folder


def served(tenants: Path, adapters: str | Path = "shared", **settings: Any) -> LLM:
    path = tenants / adapters
    options = {"dtype": "float32", "threads": 1, "max_running": 8, **settings}
    return LLM(str(tenants / "base"), adapters=path, **options)


def store(llm: LLM) -> Adapters:
    adapters = llm.engine.arrivals.adapters
    assert adapters is not None
    return adapters


def greedy(llm: LLM, prompt: list[int], adapter: Any) -> list[int]:
    """By logits alone, one token after the other; margins are wide enough for other roundings."""
    tokens = list(prompt)
    for _ in range(NEW):
        last = llm.logits([tokens], adapter=adapter)[0][-1]
        best, second = last.topk(2).values.tolist()
        assert best - second > MARGIN, "another seed"
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


def test_cores_are_the_loras_that_they_were(tenants: Path) -> None:
    with served(tenants, "loras") as before, served(tenants) as after:
        base = before.logits(PROMPTS)
        for name in NAMES:
            want, found = (llm.logits(PROMPTS, adapter=name) for llm in (before, after))
            for own, other, without in zip(found, want, base, strict=True):
                assert apart(own, other) < CLOSE
                assert len(own) == 1 or apart(own, without) > 40 * CLOSE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_tokens": 8, "block_size": 4},
        {"block_size": 4, "kv_tokens": 120, "context": 60},
        {"prefix_cache": False, "policy": "affinity"},
        {"speculation": "auto", "policy": "fair"},
        {"kernels": "plain", "step_tokens": 16},
    ],
    ids=["as it is", "chunks", "preempted", "affinity", "drafts", "plain"],
)
def test_tenants_mixed_in_one_batch_get_what_each_gets_alone(settings: dict[str, Any], tenants: Path) -> None:
    names = [*NAMES, "d", None]
    with served(tenants, "loras") as llm:
        want = {(name, i): greedy(llm, prompt, name) for name in names for i, prompt in enumerate(PROMPTS)}
    with served(tenants, **settings) as llm:
        jobs = sorted(want, key=lambda job: (names.index(job[0]) * 7 + job[1] * 5) % len(want))
        for _ in range(2):  # the second time prefixes are found
            found = llm.generate([PROMPTS[i] for _, i in jobs], GREEDY, adapter=[name for name, _ in jobs])
            assert [output.token_ids for output in found] == [want[job] for job in jobs]
        if settings.get("kv_tokens"):
            assert llm.engine.scheduler.preemptions > 0
        if settings.get("prefix_cache", True):
            assert llm.engine.scheduler.cached_tokens > 0
        assert {info.name: info.kind for info in store(llm).infos() if info.loaded} == {
            **dict.fromkeys(NAMES, "shared"),
            "d": "lora",
        }


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_bases_in_fewer_bits_serve_cores_too(bits: str, tenants: Path) -> None:
    with served(tenants, "loras", weights=bits) as before, served(tenants, weights=bits) as after:
        base = before.logits(PROMPTS)
        found = after.logits([*PROMPTS, *PROMPTS], adapter=["a"] * 3 + ["b"] * 3)
        want = [*before.logits(PROMPTS, adapter="a"), *before.logits(PROMPTS, adapter="b")]
        for own, other, without in zip(found, want, [*base, *base], strict=True):
            # inputs are rounded to int8, so that what differs in a last bit may differ in a step
            assert (own - other).norm() < 0.05 * other.norm()
            assert len(own) == 1 or (own - without).norm() > 0.2 * other.norm()


def test_in_bfloat16_a_core_is_as_near_as_a_lora(tenants: Path) -> None:
    with (
        served(tenants) as exact,
        served(tenants, dtype="bfloat16") as llm,
        served(tenants, "loras", dtype="bfloat16") as lora,
    ):
        want = torch.cat(exact.logits(PROMPTS, adapter="b"))
        own, other = ((torch.cat(one.logits(PROMPTS, adapter="b")) - want).norm() for one in (llm, lora))
        assert own < 1.5 * other + 0.01 * want.norm()


def test_prefixes_are_found_by_content(tenants: Path, tmp_path: Path) -> None:
    """The same cores under another name find them; other cores, the same LoRA and the base do not."""
    shutil.copytree(tenants / "shared", tmp_path / "shared")
    shutil.copytree(tmp_path / "shared" / "a", tmp_path / "shared" / "again")
    shutil.copytree(tenants / "loras" / "a", tmp_path / "shared" / "lora")
    with served(tenants, tmp_path / "shared", block_size=4) as llm:

        def cached(name: str | None) -> int:
            before = llm.engine.scheduler.cached_tokens
            llm.generate([PROMPTS[1]], GREEDY, adapter=name)
            return llm.engine.scheduler.cached_tokens - before

        found = [cached(name) for name in ("a", "a", "b", "lora", None, "again")]
        assert found[1] == found[5] > 0 and found[0] == found[2] == found[3] == found[4] == 0


def test_sums_with_cores_are_exact_and_products_are_refused(tenants: Path) -> None:
    with served(tenants, "loras") as before, served(tenants) as after:
        for weights in ({"a": 0.5, "b": -1.5}, {"a": 1.0, "d": 0.5}, {"a": 1.0, "b": 0.0}):
            want, found = (llm.logits([PROMPTS[1]], adapter=weights)[0] for llm in (before, after))
            assert apart(found, want) < CLOSE
        base, none = after.logits([PROMPTS[1]])[0], after.logits([PROMPTS[1]], adapter={"c": 0.0})[0]
        assert apart(none, base) < CLOSE
        product = AdapterChoice((("a", 1.0), ("b", 1.0)), "product of sums")
        with pytest.raises(BrokenAdapterError, match="'a' cannot be used: its matrices are a basis's"):
            after.logits([PROMPTS[1]], adapter=product)


def test_a_basis_is_counted_once_and_goes_with_the_last_that_stands_on_it(tenants: Path) -> None:
    with served(tenants) as llm:
        adapters, sizes = store(llm), []
        for name in NAMES:
            llm.logits([PROMPTS[0]], adapter=name)
            sizes.append(adapters.nbytes)
        (basis,) = {basis for entry in adapters._entries.values() for basis in entry.loaded.weights.bases}
        own = [entry.nbytes for entry in adapters._entries.values()]
        assert sizes == [basis.nbytes + sum(own[:i]) for i in (1, 2, 3)]
        assert basis.nbytes > 3 * own[0]
        for choice in list(adapters._entries):
            adapters._retire(choice)
        del basis
        assert adapters.nbytes == 0 and not adapters.jobs._bases
        llm.logits([PROMPTS[0]], adapter="a")
        assert adapters.nbytes == sizes[0]


def test_tenants_beyond_the_budget_come_and_go(tenants: Path, tmp_path: Path) -> None:
    """Cores go, and the basis stays while anybody stands on it; what they take together is never more."""
    shutil.copytree(tenants / "shared", tmp_path / "shared")
    for i in range(9):
        shutil.copytree(tenants / "shared" / NAMES[i % 3], tmp_path / "shared" / f"t{i}")
    with served(tenants, "loras") as llm:
        want = [greedy(llm, PROMPTS[1], name) for name in NAMES]
    with served(tenants) as llm:
        llm.logits([PROMPTS[0]], adapter="a")
        one = store(llm).nbytes
        llm.logits([PROMPTS[0]], adapter="b")
        core = store(llm).nbytes - one
    with served(tenants, tmp_path / "shared", adapter_bytes=one + 2 * core) as llm:
        for _ in range(2):
            found = llm.generate([PROMPTS[1]] * 9, GREEDY, adapter=[f"t{i}" for i in range(9)])
            assert [output.token_ids for output in found] == [want[i % 3] for i in range(9)]
        adapters = store(llm)
        assert adapters.counts.evictions > 0 and one <= adapters.nbytes <= adapters.budget
    with (
        served(tenants, adapter_bytes=one - 1) as llm,
        pytest.raises(BrokenAdapterError, match=f"it takes {one} bytes"),
    ):
        llm.logits([PROMPTS[0]], adapter="a")


def test_a_basis_that_is_missing_or_another_is_named(tenants: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    shutil.copytree(tenants / "shared", folder)
    (basis,) = folder.glob(".basis-*")
    whole, digits = basis.read_bytes(), basis.name[7:23]

    def told(change: bytes | None) -> str:
        basis.unlink(missing_ok=True)
        if change is not None:
            basis.write_bytes(change)
        with served(tenants, folder) as llm, pytest.raises(BrokenAdapterError) as error:
            llm.logits([PROMPTS[0]], adapter="b")
        assert str(tmp_path) not in str(error.value)
        return str(error.value)

    assert f"adapter 'b' cannot be used: its basis {digits} is missing: {basis.name} must lie beside" in told(None)
    assert f"basis {basis.name} has changed: its numbers are not those" in told(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "not a readable safetensors file" in told(whole[: len(whole) // 2])
    digest = read_basis(tenants / "shared" / basis.name).digest
    other = digest[:16] + digest[16:][::-1]
    text = told(whole.replace(digest.encode(), other.encode()))
    assert f"basis {basis.name} has changed: its digest is {other}, not {digest}" in text


def test_a_basis_that_comes_back_is_seen(tenants: Path, tmp_path: Path) -> None:
    """And one that changes takes nothing from those that run, but nobody new gets it."""
    folder = tmp_path / "shared"
    shutil.copytree(tenants / "shared", folder)
    (basis,) = folder.glob(".basis-*")
    basis.rename(tmp_path / "kept")
    with served(tenants, folder) as llm:
        adapters = store(llm)
        now = [0.0]
        adapters.folder._clock = lambda: now[0]
        with pytest.raises(BrokenAdapterError, match="is missing"):
            llm.logits([PROMPTS[0]], adapter="a")
        shutil.copy(tmp_path / "kept", basis)
        now[0] += 2
        assert llm.logits([PROMPTS[0]], adapter="a")[0].isfinite().all()
        basis.unlink()
        now[0] += 2
        with pytest.raises(BrokenAdapterError, match="is missing"):
            llm.logits([PROMPTS[0]], adapter="a")
        assert adapters.nbytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"core": torch.ones(5, 6)}, r"core has shape \[5, 6\]; \[6, 6\] is expected by its basis"),
        ({"core": torch.full((6, 6), float("nan"))}, "holds 36 values that are not finite"),
        ({"core": torch.full((6, 6), 1e13)}, r"holds 1e\+13; at most 1e\+12"),
        ({"core": torch.ones(6, 6, dtype=torch.int32)}, "is stored as int32; expected floating"),
        ({"name": "model.layers.0.self_attn.w_proj"}, "matches nothing in the base model"),
        ({"config": "{}"}, "the folder holds .* and adapter_config.json; one adapter is in each"),
    ],
    ids=["shape", "nan", "large", "dtype", "module", "two"],
)
def test_cores_that_do_not_fit_are_named(change: dict[str, Any], message: str, tenants: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (basis,) = (tenants / "shared").glob(".basis-*")
    shutil.copy(basis, folder)
    name = change.get("name", "model.layers.0.self_attn.q_proj")
    write_cores(folder / "x", read_basis(basis), {name: change.get("core", torch.ones(6, 6))})
    if "config" in change:
        (folder / "x" / "adapter_config.json").write_text(change["config"])
    with served(tenants, folder) as llm, pytest.raises(BrokenAdapterError, match=message):
        llm.logits([PROMPTS[0]], adapter="x")


@pytest.mark.parametrize("count", [160, pytest.param(1000, marks=pytest.mark.full)])
def test_tenants_are_in_memory_at_the_price_of_their_cores(count: int, tenants: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (basis,) = (tenants / "shared").glob(".basis-*")
    shutil.copy(basis, folder)
    stored = read_basis(basis)
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        write_cores(folder / f"t{i:03d}", stored, {name: torch.randn(6, 6, generator=g) for name in stored.modules})
    with served(tenants, folder) as llm:
        names = [f"t{i:03d}" for i in range(count)]
        llm.engine.arrivals.check([AdapterChoice.of(name) for name in names], llm.engine.step)
        adapters = store(llm)
        assert adapters.in_memory == count and adapters.counts.evictions == 0
        (shared,) = {basis for entry in adapters._entries.values() for basis in entry.loaded.weights.bases}
        each = (adapters.nbytes - shared.nbytes) / count
        rank, modules = 16, len(stored.modules)  # rows in panels, and a scale of each row
        assert each <= modules * (rank * 6 + rank) * 4 * 1.1
        found = llm.generate([PROMPTS[0]] * 8, GREEDY, adapter=names[:: count // 8])
        assert len({tuple(output.token_ids) for output in found}) > 4
