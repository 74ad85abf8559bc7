"""The layers on a real GPU, compiled: against their plain twins in float64, and captured in a graph."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoder_steps import BLOCK, PAGES, decoder, steps
from support.layer_parts import ffn_parts, moe_parts
from torch import Tensor

from dsc_kernels import native, ops, plain, reference
from dsc_kernels.weights import KvCache, MlpWeights
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.graphs import capture_for
from dsc_serve.engine.runner import Runner
from dsc_serve.sampling_params import EngineCapacity, SamplingParams

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def random(g: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=g) * scale).to("cuda", dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want.double()).norm() / want.double().norm()).nan_to_num(torch.inf))


def dsc_layer(dtype: torch.dtype, d: int, atoms: int, k: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(d)
    return {
        "up": random(g, dtype, 327, d, scale=d**-0.5),
        "gate": None,
        "down": random(g, dtype, d, 327, scale=327**-0.5),
        "activation": "gelu",
        "router": random(g, dtype, atoms, d, scale=d**-0.5),
        "router_bias": random(g, torch.float32, atoms, scale=0.3),
        "u": reference.project(random(g, torch.float32, atoms, d), 1e-6).to(dtype),
        "v": reference.project(random(g, torch.float32, atoms, d), 1e-6).to(dtype),
        "gamma": torch.rand(d, generator=g).cuda(),
        "k": k,
        "tau": 20.0,
        "eps": 1e-6,
        "norm_eps": 1e-5,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "atoms", "k"), [(384, 1523, 4), (67, 101, 5), (4096, 4096, 32)])
@pytest.mark.parametrize("batch", [1, 16, 300])
def test_dsc_layer(dtype: torch.dtype, d: int, atoms: int, k: int, batch: int) -> None:
    from dsc_kernels.gpu import layers

    arguments = dsc_layer(dtype, d, atoms, k)
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    x = random(torch.Generator().manual_seed(batch), dtype, batch, d)
    out, picks, weights, _ = layers.Ffn(**ffn_parts(**arguments)).routed(x)
    logits = reference.router_logits(x.double(), wide["router"], wide["router_bias"], 1e-5).clamp(-20, 20)
    ordered = logits.sort(dim=1, descending=True)
    sure = ordered.values[:, k - 1] - ordered.values[:, k] > 1e-3
    same = (picks.long().sort(dim=1).values == ordered.indices[:, :k].sort(dim=1).values).all(dim=1)
    assert bool(same[sure].all())
    want_weights, _ = reference.coefficients(logits.gather(1, picks.long()), 1e-6)
    dynamic = reference.compose(x.double(), picks.long(), want_weights, wide["u"], wide["v"], wide["gamma"])
    want = plain.Mlp(MlpWeights(wide["up"], None, wide["down"]), "gelu")(x.double()) + dynamic
    assert error(out, want) < TOLERANCE[dtype] and error(weights, want_weights) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "atoms", "k"), [(384, 1523, 4), (67, 101, 5), (4096, 4096, 32)])
@pytest.mark.parametrize("batch", [1, 16, 32, 33])
def test_a_screened_router_changes_nothing(dtype: torch.dtype, d: int, atoms: int, k: int, batch: int) -> None:
    """Bit for bit, eagerly and in a captured graph; and rows are left out."""
    from dsc_kernels.gpu import layers

    parts, made = ffn_parts(**dsc_layer(dtype, d, atoms, k)), []
    for precision in ("exact", "int8-certified"):
        native.use_router(precision)  # type: ignore[arg-type]
        made.append(layers.Ffn(**parts))
    exact, screened = made
    x = random(torch.Generator().manual_seed(batch), dtype, batch, d)
    wanted = exact.routed(x)
    assert all(torch.equal(one, other) for one, other in zip(screened.routed(x), wanted, strict=True))
    capture = capture_for(dtype, x.device)
    assert capture is not None
    graph, out = capture(lambda: screened(x))
    graph.replay()
    assert torch.equal(out, wanted[0])
    rows, tokens = screened.rescored
    assert tokens == 0 if batch > 32 else batch * k <= rows * batch / tokens < batch * atoms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16, 300])
def test_moe_layer_waits_for_nothing(dtype: torch.dtype, batch: int) -> None:
    from dsc_kernels.gpu import layers

    g = torch.Generator().manual_seed(0)
    up = [random(g, dtype, 545, 384, scale=384**-0.5) for _ in range(5)]
    down = [random(g, dtype, 384, 545, scale=545**-0.5) for _ in range(5)]
    router = random(g, dtype, 5, 384, scale=384**-0.5)
    options = {"activation": "gelu", "k": 2}
    layer = layers.Moe(**moe_parts(router, None, up, None, down, 1e-5, **options))
    x = random(g, dtype, batch, 384)
    out = layer(x)
    weights, experts = layer.route(x)
    matrices = [w.double() for w in up], None, [w.double() for w in down]
    oracle = plain.Moe(**moe_parts(router, None, *matrices, 1e-5, **options))
    outputs = torch.stack([expert(x.double()) for expert in oracle.experts], dim=1)
    picked = outputs.gather(1, experts.long()[:, :, None].expand(-1, -1, 384))
    assert error(out, (picked * weights.double()[:, :, None]).sum(dim=1)) < TOLERANCE[dtype]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait for the device would raise here
        captured = layer(x)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(6, 1, 64), (8, 4, 128), (1, 3, 20)])
def test_decode_attention(dtype: torch.dtype, kv_heads: int, group: int, size: int) -> None:
    from dsc_kernels.gpu.attention import decode_attention

    g = torch.Generator().manual_seed(size)
    contexts = torch.tensor([1, 16, 700, 2049], device="cuda")
    keys, values = (random(g, dtype, 600, kv_heads, 16, size) for _ in range(2))
    tables = torch.randperm(600, generator=g)[:516].view(4, 129).cuda()
    q = random(g, dtype, 4, kv_heads * group, size)
    got = decode_attention(q, KvCache(keys, values), tables, contexts, 2049, size**-0.5)
    wide = KvCache(keys.double(), values.double())
    want = plain.decode_attention(q.double(), wide, tables, contexts, 2049, size**-0.5)
    assert error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
@torch.inference_mode()
def test_decoders_in_one_call_and_in_a_graph(kind: str) -> None:
    from dsc_kernels.gpu.stack import Stack

    cuda = torch.device("cuda")
    ours, theirs = (decoder(kernels, kind, "Llama", cuda) for kernels in ("triton", "plain"))
    caches = [model.kv_caches(PAGES, BLOCK) for model in (ours, theirs)]
    assert isinstance(ours.stack, Stack)
    for batch in steps(cuda):
        ops.use("triton")
        got = ours.hidden(batch, caches[0])
        ops.use("plain")
        assert error(got, theirs.hidden(batch, caches[1])) < 1e-4
    ops.use("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours.hidden(batch, caches[0])
    graph.replay()
    ops.use("auto")
    assert error(captured, got) < 1e-6


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_an_engine_says_the_same_with_graphs_and_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, feeds, chunks of prompts and dependent launches in real graphs; greedy and sampled, ahead and not."""
    from dsc_kernels.gpu import compiler

    cuda = torch.device("cuda")
    found = []
    ways = (False, False, False), (True, False, False), (True, False, True), (True, True, True)
    for capture, ahead, chained in ways:
        own = compiler.chain_of(compiler.architecture() if chained else None)
        monkeypatch.setattr(compiler, "chain", lambda own=own: own)
        for module in launching():
            monkeypatch.setattr(module, "chain", lambda own=own: own)
        model = decoder("triton", kind, "Llama", cuda)
        capacity = EngineCapacity(61, 48, 60, 4)
        config = EngineConfig(max_running=6, step_tokens=24, block_size=4, prefix_cache=False)
        runner = Runner(model, capacity, 24, 6, capture_for(model.dtype, cuda) if capture else None, ahead=ahead)
        engine = Engine(config, capacity, runner, (), True, ahead=runner if ahead else None)
        for i in range(6):
            params = SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12 - i, ignore_eos=True)
            engine.add(str(i), [(7 * i + j) % 61 for j in range(2 + 5 * i)], params)
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for delta in engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        found.append(tokens)
    ops.use("auto")
    assert all(tokens == found[0] for tokens in found[1:])


def launching() -> list[Any]:
    """The modules that launch kernels."""
    from dsc_kernels import gpu

    names = [file.stem for file in Path(str(gpu.__file__)).parent.glob("[!_]*.py")]
    modules = [importlib.import_module(f"dsc_kernels.gpu.{name}") for name in names]
    return [module for module in modules if hasattr(module, "chain") and module.__name__ != "dsc_kernels.gpu.compiler"]
