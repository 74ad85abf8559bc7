"""A model in parts: what each rank has, what is refused, and that ranks together compute what one does alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.quantised import Weight
from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.decoder import Decoder, tensor_shapes
from dsc_serve.model.exchange import ALONE, GroupLostError, RankExchange, Shard
from dsc_serve.model.ffn.dsc import DscFfn
from dsc_serve.model.group import RankGroup
from dsc_serve.model.rounding import rounded
from dsc_serve.model.sharding import rank_config, rank_tensors
from dsc_serve.scale.estimate import ModelSizes, exchanges

CPU = torch.device("cpu")
BLOCK = 4
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}

GROUPED: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
SHARED_EXPERT = {"size": 18, "gated": True}
CASES: dict[str, ModelConfig] = {
    "dsc": small_config(),
    "dsc of Algorithm 1": small_config(ffn={"router_norm": False, "router_bias": False, "gamma": "scalar"}),
    "dsc whose logits tie": small_config(ffn={"tau": 0.05}),
    "dsc, gated, grouped queries": small_config(mlp_gated=True, **GROUPED),
    "moe": small_config("moe"),
    "moe with a shared expert": small_config("moe", ffn={"shared_expert": SHARED_EXPERT}, mlp_gated=True),
    "molora": small_config("molora"),
    "dense": small_config("dense"),
    "dense with biases": small_config(
        "dense", ffn={"bias": True}, attention_bias=True, attention_output_bias=True, **GROUPED
    ),
    "norms around": small_config("dense", norms="around", norm_type="rmsnorm", qk_norm="head"),
    "norms after": small_config(norms="after"),
    "parallel": small_config("dense", norms="shared", position_embedding_type="learned"),
    "kinds of layers": small_config(
        layer_kinds=[{}, {"ffn": {"kind": "dense", "size": 30}, "window": 6}], layer_pattern=[0, 1]
    ),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def decoder(config: ModelConfig, tensors: Mapping[str, Weight], exchange: RankExchange = ALONE) -> Decoder:
    return Decoder(config, tensors, torch.float32, CPU, exchange=exchange)


def logits(model: Decoder, ids: Tensor, chunk: int, int8: bool = False) -> Tensor:
    """Of a prompt in chunks, and of its last tokens one by one: float32 [T, vocabulary]."""
    total, groups = len(ids), len(model.groups.windows)
    pages = -(-total // BLOCK)
    caches = model.kv_caches(groups * pages, BLOCK, int8)
    tables = torch.arange(groups * pages).view(groups, 1, pages)
    sizes = [chunk] * ((total - 3) // chunk)
    sizes += [1] * (total - sum(sizes))
    found, done = [], 0
    for size in sizes:
        positions = torch.arange(done, done + size)
        blocks, context = tables[:, 0, positions // BLOCK], torch.tensor([done + size])
        single = size == 1
        chunks = () if single else (Chunk(0, 0, size, done + size),)
        places = positions, blocks, positions % BLOCK, tables, context
        batch = StepBatch(ids[positions], *places, int(single), done + 1 if single else 0, chunks)
        found.append(model.logits(model.hidden(batch, caches)))
        done += size
    return torch.cat(found)


@cases
@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_all_ranks_are_the_tensors(config: ModelConfig, size: int) -> None:
    if size > config.num_key_value_heads:
        config = config.model_copy(update={"num_key_value_heads": 4, "num_attention_heads": 4})
    tensors = wide_tensors(config)
    parts = [rank_tensors(config, tensors, Shard(rank, size)) for rank in range(size)]
    shapes = [tensor_shapes(rank_config(config, Shard(rank, size))) for rank in range(size)]
    for name, whole in tensors.items():
        own = [part[name] for part in parts]
        assert all(isinstance(one, Tensor) and one.is_contiguous() for one in own)
        assert [tuple(one.shape) for one in own] == [shape[name] for shape in shapes]
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            torch.testing.assert_close(sum(own), whole, rtol=0, atol=0)
        elif own[0].shape == whole.shape:
            assert all(torch.equal(one, whole) for one in own)
        else:
            (dim,) = (i for i, length in enumerate(whole.shape) if own[0].shape[i] != length)
            torch.testing.assert_close(torch.cat(own, dim), whole, rtol=0, atol=0)


def test_a_rank_that_is_alone_has_what_it_is_given() -> None:
    config = small_config()
    tensors = wide_tensors(config)
    assert rank_config(config, Shard()) is config
    assert rank_tensors(config, tensors, Shard()) is tensors


def test_every_count_is_divided_to_within_one() -> None:
    config = small_config(mlp_gated=True, **GROUPED)
    own = [rank_config(config, Shard(rank, 2)) for rank in range(2)]
    assert [(one.num_key_value_heads, one.num_attention_heads) for one in own] == [(1, 2), (2, 4)]
    assert [one.ffn.num_atoms for one in own] == [18, 19]  # type: ignore[union-attr]
    assert [list(Shard(rank, 3).part(7)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("size", [2, 3])
@cases
def test_ranks_give_the_logits_of_one(config: ModelConfig, size: int, kernels: str, tmp_path: Path) -> None:
    if size > config.num_key_value_heads:
        config = config.model_copy(update={"num_key_value_heads": 4, "num_attention_heads": 4})
    ops.use(kernels)
    tensors, ids = wide_tensors(config), torch.randint(61, (21,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = logits(decoder(config, tensors), ids, 6)
    for got in on_ranks(size, tmp_path, lambda group: logits(decoder(config, tensors, group), ids, 6)):
        torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("kind", ["dsc", "dsc whose logits tie", "molora", "moe with a shared expert"])
def test_ranks_pick_what_one_does_and_tell_all_the_same(kind: str, tmp_path: Path) -> None:
    config, x = CASES[kind], torch.randn(33, 32, generator=torch.Generator().manual_seed(2))
    tensors, residual = wide_tensors(config), torch.randn(33, 32)

    def routed(model: Decoder) -> tuple[Tensor, ...]:
        out, picks = model.layers[1].ffn.routed(x, residual)  # type: ignore[attr-defined]
        return out, *picks

    def ordered(atoms: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        order = atoms.argsort(dim=1)
        return atoms.gather(1, order).long(), weights.gather(1, order)

    want = routed(decoder(config, tensors))
    got = on_ranks(2, tmp_path, lambda group: routed(decoder(config, tensors, group)))
    for out, atoms, weights, signal in got:
        torch.testing.assert_close(out, want[0], **TOLERANCE)
        (own, gates), (theirs, expected) = ordered(atoms, weights), ordered(want[1], want[2])
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)
        torch.testing.assert_close(gates, expected, **TOLERANCE)
        torch.testing.assert_close(signal, want[3], **TOLERANCE)
    for one, other in zip(*got, strict=True):
        assert torch.equal(one, other), "ranks must go on with the same bits"


def test_picks_are_traced_by_the_names_that_atoms_have_in_the_whole(tmp_path: Path) -> None:
    config = CASES["dsc"]
    tensors = wide_tensors(config)

    def shape(group: RankGroup) -> tuple[int, int]:
        ffn = decoder(config, tensors, group).layers[0].ffn
        assert isinstance(ffn, DscFfn)
        return ffn.shape.atoms, ffn.u.shape[0]

    assert on_ranks(2, tmp_path, shape) == [(37, 18), (37, 19)]


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_sends_the_bytes_that_the_estimate_of_a_bank_by_rows_says(
    tokens: int, size: int, tmp_path: Path
) -> None:
    config = small_config(num_key_value_heads=4, num_attention_heads=4, head_dim=8)
    tensors, x = wide_tensors(config), torch.randn(tokens, 32)

    def sent(group: RankGroup) -> float:
        model, before = decoder(config, tensors, group), group.sent
        model.layers[0].ffn(x, x)
        return group.sent - before

    sizes = ModelSizes(d=32, layers=2, vocabulary=61, kv=32, atoms=37, k=3, static=24, context=48, weight_bytes=4)
    found = exchanges(sizes, tokens, size, "rows")
    for bytes_sent in on_ranks(size, tmp_path, sent):
        assert bytes_sent == pytest.approx(found["output"] + found["candidates"])


@pytest.mark.skipif(not native.available(), reason="native kernels are not built")
def test_ranks_in_bfloat16_differ_from_one_by_rounding_alone(tmp_path: Path) -> None:
    config = CASES["dense"]
    tensors, x = wide_tensors(config), torch.randn(8, 32).bfloat16()

    def out(exchange: RankExchange) -> Tensor:
        model = Decoder(config, tensors, torch.bfloat16, CPU, exchange=exchange)
        return model.layers[0].ffn(x, x).float()

    want = out(ALONE)
    for got in on_ranks(2, tmp_path, out):
        assert torch.linalg.vector_norm(got - want) < 0.02 * torch.linalg.vector_norm(want)


def test_keys_and_values_in_int8_are_kept_by_heads(tmp_path: Path) -> None:
    config, ids = CASES["dsc, gated, grouped queries"], torch.arange(21)
    tensors = wide_tensors(config)
    with torch.inference_mode():
        want = logits(decoder(config, tensors), ids, 6, int8=True)
    for got in on_ranks(2, tmp_path, lambda group: logits(decoder(config, tensors, group), ids, 6, int8=True)):
        torch.testing.assert_close(got, want, atol=0.02, rtol=0)


LATENT = {"num_key_value_heads": 1, "head_dim": 24, "latent_size": 16, "rotary_dim": 8, "qk_norm": "latent"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (small_config(num_key_value_heads=1), "num_key_value_heads is 1; tensor_parallel is 2"),
        (small_config(ffn={"static_size": 1}), "ffn.static_size is 1; tensor_parallel is 2"),
        (small_config("moe", ffn={"expert_size": 1}), "ffn.expert_size is 1; tensor_parallel is 2"),
        (
            small_config("moe", ffn={"shared_expert": {"size": 1}}),
            "ffn.shared_expert.size is 1; tensor_parallel is 2",
        ),
        (
            small_config(ffn={"num_atoms": 5, "atoms_per_token": 3}),
            "ffn.atoms_per_token is 3, ffn.num_atoms 5; tensor_parallel is 2, and each rank must have as many",
        ),
        (
            small_config("molora", ffn={"num_adapters": 3}),
            "ffn.adapters_per_token is 2, ffn.num_adapters 3; tensor_parallel is 2",
        ),
        (small_config(**LATENT), "latent_size is 16, one head of keys for all; tensor_parallel is 2, allowed: 1"),
        (small_config(qk_norm="all"), "qk_norm is 'all', over the heads of all ranks; tensor_parallel is 2"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_field_and_value(config: ModelConfig, words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        rank_config(config, Shard(0, 2))
    assert words in str(error.value)


class Unconnected(RankGroup):
    """The first of two ranks that nobody meets."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Shard(0, 2), folder / "store", CPU)


def test_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    config = small_config("dense")
    tensors: dict[str, Weight] = {**wide_tensors(config)}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = rounded(tensors[name], 8)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"tensor {name} is quantised; tensor_parallel is 2, with which weights"):
        decoder(config, tensors, Unconnected(tmp_path))


def test_a_bank_that_its_tenants_alone_use_is_refused(tmp_path: Path) -> None:
    config = small_config()
    tensors = wide_tensors(config)
    tensors["model.layers.0.mlp.gamma"].zero_()
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.gamma: 0 throughout"):
        decoder(config, tensors, Unconnected(tmp_path))


def test_the_path_of_a_model_that_cannot_be_shared_is_told(small_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = small_model(num_key_value_heads=1)
    with pytest.raises(CheckpointError) as error:
        load_model(folder, "float32", CPU, exchange=Unconnected(tmp_path))
    assert str(error.value).startswith(f"{folder}: num_key_value_heads is 1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "int8"}, "weights is 'int8' but tensor_parallel is 2; allowed with it: 'auto', 'stored'"),
        ({"keep": "router=int8"}, "keep is 'router=int8' but tensor_parallel is 2"),
        ({"router_precision": "int8-certified"}, "router_precision is 'int8-certified' but tensor_parallel is 2"),
        ({"grouping": "always"}, "grouping is 'always' but tensor_parallel is 2; allowed with it: 'auto', 'off'"),
        ({"adapters": "folder"}, "adapters is 'folder' but tensor_parallel is 2"),
        ({"draft_model": "m", "speculation": "auto"}, "draft_model is 'm' but tensor_parallel is 2"),
    ],
)
def test_settings_that_shared_models_do_not_have_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(tensor_parallel=2, **settings)
    assert words in str(error.value)


def test_a_shared_model_is_not_taken_for_a_whole_one() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel is 2, which servers and LLM take; allowed here: 1"):
        prepare_model(EngineConfig(tensor_parallel=2))


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsc_serve.engine.start import start_engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="tensor_parallel is 4; torch finds 2 CUDA devices"):
        start_engine(EngineConfig(device="cuda", tensor_parallel=4))


def test_a_rank_that_nobody_meets_says_so_in_time(tmp_path: Path) -> None:
    group = RankGroup(Shard(0, 2), tmp_path / "store", CPU, limit_s=0.2)
    with pytest.raises(GroupLostError, match="rank 0 of 2 could not meet the others"):
        group.connect()
    with pytest.raises(GroupLostError, match="is not connected"):
        group.sum(torch.zeros(1))
