"""Models with weights in 4 and 8 bits: GGUF files as they are, checkpoints that carry them, and rounded at load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from support.family_files import FILES, family_file
from support.foreign import PROMPT
from support.resident import resident_growth
from support.small_models import small_config, wide_tensors
from test_import_gguf import byte_level_vocabulary, config, write
from torch import Tensor

from dsc_serve import LLM
from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.model.checkpoint import load_model, open_source, save_checkpoint
from dsc_serve.model.config import CheckpointError, ModelConfig, load_config
from dsc_serve.model.decoder import dsc_layers
from dsc_serve.model.gguf import stored
from dsc_serve.model.placement import BITS
from dsc_serve.model.quantised_tensor import QuantisedTensor
from dsc_serve.model.rounding import rounded
from dsc_serve.model.source import Stored
from dsc_serve.weight_forms import PARTS, KeepError, forms_of, kept, part_of

CPU = torch.device("cpu")
Kind = gguf.GGMLQuantizationType
KINDS = (Kind.Q4_0, Kind.Q8_0, Kind.Q4_1, Kind.Q5_1, Kind.Q5_0)
WIDE = {"hidden_size": 64, "head_dim": 16, "ffn": {"size": 96}}  # of which blocks of 32 are rows
NEAR = 1e-3


def logits_of(path: Path, **settings: Any) -> Tensor:
    with LLM(str(path), dtype="float32", threads=1, **settings) as llm:
        return llm.logits([PROMPT[:16]])[0]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def quantising(monkeypatch: pytest.MonkeyPatch, kinds: tuple[Any, ...] = KINDS) -> list[str]:
    """From now on files have matrices of these kinds, by turns; returns the names of those that do."""
    add, named = gguf.GGUFWriter.add_tensor, list[str]()

    def added(self: Any, name: str, tensor: np.ndarray, **options: Any) -> None:
        if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 and "raw_dtype" not in options and "_inp" not in name:
            kind = kinds[len(named) % len(kinds)]
            named.append(name)
            options, tensor = {"raw_dtype": kind}, quantize(np.ascontiguousarray(tensor), kind)
        add(self, name, tensor, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", added)
    return named


def as_quantised(entry: Any) -> Stored:
    """What a file would give if its matrices were quantised, in widths that no block of a file has, too."""
    own = stored(entry)
    if len(own.shape) < 2 or "_inp" in entry.name:
        return own

    def quantised() -> QuantisedTensor:
        wide, bits = own.read(), 4 if entry.name.endswith(("attn_v.weight", "ffn_down.weight")) else 8
        one = rounded(wide.flatten(0, -2), bits)  # type: ignore[arg-type]
        whole = QuantisedTensor(one.values, one.scales, one.minimums, one.bits, one.group, tuple(one.shape))
        return replace(whole.mapped(lambda part: part.unflatten(0, wide.shape[:-1])), shape=tuple(wide.shape))

    return Stored(own.shape, own.dtype, lambda: quantised().dequantised(), quantised)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_family_is_served_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits as with its values in floating point, and hardly a matrix of it held in any."""
    monkeypatch.setattr("dsc_serve.model.gguf.stored", as_quantised)
    file = family_file(name, tmp_path / "m.gguf")
    want = logits_of(file, weights="bfloat16", kernels="plain")
    # Granite's multipliers are rounded to float16 with the scales that they go into.
    most = 1e-3 if name.startswith("granite") else 1e-4
    assert error(logits_of(file, weights="stored", kernels="plain"), want) < most
    got = logits_of(file, weights="stored")
    # A router whose logits nearly tie picks another expert for a token, and sharp attention magnifies what is rounded.
    rows = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(rows.median()) < 2 * NEAR and error(got, want) < 4 * NEAR
    model = load_model(file, "float32", CPU, weights="stored")
    held, c = model.held, model.config
    made = 0 if c.latent_size is None else 4 * c.num_hidden_layers * c.projected * c.hidden_size  # of two matrices each
    assert held["float32"] - made < 0.1 * sum(held.values())


def test_a_file_of_all_kinds_that_keep_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, model = quantising(monkeypatch), config(**WIDE)
    write(tmp_path / "m.gguf", wide_tensors(model), model, byte_level_vocabulary(), quantised=False)
    assert len(named) == 15
    want = logits_of(tmp_path / "m.gguf", weights="bfloat16", kernels="plain")
    assert error(logits_of(tmp_path / "m.gguf", weights="stored", kernels="plain"), want) < 1e-4
    assert error(logits_of(tmp_path / "m.gguf", weights="stored"), want) < NEAR


def test_no_copy_of_a_file_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantising(monkeypatch, (Kind.Q4_1,))
    model = config(**WIDE)
    write(tmp_path / "m.gguf", wide_tensors(model), model, byte_level_vocabulary(), quantised=False)
    found = load_model(tmp_path / "m.gguf", "float32", CPU, weights="stored")
    assert found.held.keys() == {"int4 in groups of 32"}
    matrices = sum(
        torch.Size(own.shape).numel() for own in open_source(tmp_path / "m.gguf").tensors.values() if len(own.shape) > 1
    )
    assert sum(found.held.values()) == matrices * 5 / 8


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_refused_by_its_tensors_name(
    kind: Any, number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantising(monkeypatch, (kind,))
    model, file = config(**WIDE), tmp_path / "m.gguf"
    write(file, wide_tensors(model), model, byte_level_vocabulary(), quantised=False)
    entry = next(own for own in gguf.GGUFReader(file).tensors if own.name == "blk.1.ffn_down.weight")
    with file.open("r+b") as stream:
        stream.seek(entry.data_offset + 3 * gguf.GGML_QUANT_SIZES[kind][1])
        stream.write(np.array([number], dtype=np.float16).tobytes())
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds 1 scales"):
        load_model(file, "float32", CPU, weights="stored")


# --- checkpoints of the serving form


def saved(folder: Path, kind: str, bits: Any, **changes: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A folder with all its matrices in so many bits; returns the values that it holds."""
    model = small_config(kind, **changes)
    tensors: dict[str, Any] = wide_tensors(model)
    for name, tensor in tensors.items():
        part = part_of(name)
        if part in (None, "bank"):
            continue
        own = rounded(tensor.flatten(0, -2), 8 if part == "router" else bits)
        tensors[name] = QuantisedTensor(own.values, own.scales, own.minimums, own.bits, own.group, tuple(tensor.shape))
    save_checkpoint(model, tensors, folder)
    return model, {name: own if isinstance(own, Tensor) else own.dequantised() for name, own in tensors.items()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_a_checkpoint_carries_quantised_tensors(kind: str, bits: int, tmp_path: Path) -> None:
    model, values = saved(tmp_path / "m", kind, bits)
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert content["format"] == 3
    assert load_config(tmp_path / "m").quantised
    save_checkpoint(model, values, tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["format"] == 1
    want = logits_of(tmp_path / "wide", kernels="plain")
    again = 0.06  # what a router loses that is rounded once more with its norm folded in
    assert error(logits_of(tmp_path / "m", kernels="plain"), want) < (1e-4 if kind == "dense" else again)
    assert error(logits_of(tmp_path / "m"), want) < (NEAR if kind == "dense" else again)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": ["model.layers.0.no"]}, "quantised names tensor model.layers.0.no, which does not belong"),
        ({"tensors": ["model.norm.weight"]}, "quantised names tensor model.norm.weight, which is no matrix"),
        ({"tensors": [Q, Q]}, f"quantised names tensor {Q} twice"),
        ({"minimum": True}, f"tensor {Q}.minimums is missing"),
        ({"rank": 2}, f"tensor {Q}.left is missing"),
        ({"group": 16}, f"tensor {Q}.scales is float16 [32, 1], expected float16 [32, 2]"),
        ({"bits": 4}, f"tensor {Q}.values is int8 [32, 32], expected uint8 [32, 16]"),
        ({"bits": 5}, "quantised.0.bits"),
        ({"group": 64}, "quantised.0.group"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = small_config("dense")
    tensors: dict[str, Any] = wide_tensors(model)
    own = rounded(tensors[Q], 8)
    tensors[Q] = QuantisedTensor(own.values, own.scales, None, 8, 32, (32, 32))
    save_checkpoint(model, tensors, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    content = json.loads(path.read_text())
    content["quantised"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as raised:
        load_model(tmp_path / "m", "float32", CPU)
    assert message in str(raised.value)


# --- rounded at load


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_weights_are_rounded_at_load(kind: str, weights: str, tmp_path: Path) -> None:
    model = small_config(kind)
    save_checkpoint(model, wide_tensors(model), tmp_path / "m")
    found = load_model(tmp_path / "m", "float32", CPU, weights=weights)
    assert any(form.startswith(weights) for form in found.held)
    forms = forms_of(weights, "", kind, model.tie_word_embeddings)
    floating = [part for part in PARTS if forms[part] not in BITS]
    assert floating == (["router"] if kind in ("moe", "molora") else [])
    for layer in dsc_layers(found):  # the certificate holds for the rows that are served
        assert max(float(bank.whole(torch.float64).norm(dim=1).max()) for bank in (layer.u, layer.v)) <= 1  # type: ignore[union-attr]


def test_int8_at_load_changes_logits_little_and_int4_more(tmp_path: Path) -> None:
    model = small_config("dense", num_hidden_layers=2)
    save_checkpoint(model, wide_tensors(model), tmp_path / "m")
    want = logits_of(tmp_path / "m")
    eight, four = (error(logits_of(tmp_path / "m", weights=weights), want) for weights in ("int8", "int4"))
    assert 0 < eight < 0.03 < four < 0.3


def test_what_is_stored_in_fewer_bits_stays_and_bfloat16_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantising(monkeypatch, (Kind.Q4_0,))
    model = config(**WIDE)
    write(tmp_path / "m.gguf", wide_tensors(model), model, byte_level_vocabulary(), quantised=False)
    held = {
        weights: load_model(tmp_path / "m.gguf", "float32", CPU, weights=weights).held
        for weights in ("auto", "stored", "int8", "int4", "bfloat16")
    }
    assert held["stored"] == held["int8"] == held["int4"]
    assert held["auto"].keys() == held["bfloat16"].keys() == {"float32"}
    by_default = load_model(tmp_path / "m.gguf", "bfloat16", CPU).held
    assert by_default == held["stored"]


def test_exceptions_hold_by_parts(tmp_path: Path) -> None:
    model = small_config("dsc", tie_word_embeddings=False)
    save_checkpoint(model, wide_tensors(model), tmp_path / "m")
    every = load_model(tmp_path / "m", "float32", CPU, weights="int4").held
    some = load_model(tmp_path / "m", "float32", CPU, weights="int4", keep="head,mlp=int8,router=bfloat16").held
    assert "float32" not in every
    assert some["float32"] == 4 * (61 * 32 + 2 * 37 * 32)
    assert some["int8 in groups of 32"] > every["int8 in groups of 32"] - 61 * 34 - 2 * 37 * 34


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("heads", "'heads' is no part of a model; allowed: embedding, head"),
        ("head=int3", "head cannot be 'int3'; allowed: stored, bfloat16, int8, int4"),
        ("router=int4", "router cannot be int4; allowed: stored, bfloat16, int8"),
        ("head,head=int8", "head is there twice"),
        ("head,", "'' is no part of a model"),
    ],
)
def test_exceptions_that_cannot_be_are_named(keep: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineConfig(keep=keep)
    assert message in str(raised.value) and f"keep is {keep!r}" in str(raised.value)


def test_a_head_that_is_the_embedding_has_its_form() -> None:
    assert kept(" head = int8 , router") == {"head": "int8", "router": "stored"}
    forms = forms_of("int4", "head=int4", "dense", tied=True)
    assert forms["head"] == forms["embedding"] == "int4"
    with pytest.raises(KeepError, match="both have one form"):
        forms_of("int4", "head=int4,embedding", "dense", tied=True)
    assert forms_of("int4", "head=int4,embedding", "dense", tied=False)["embedding"] == "stored"


def test_a_part_that_a_model_does_not_have_is_named(tmp_path: Path) -> None:
    save_checkpoint(small_config("dense"), wide_tensors(small_config("dense")), tmp_path / "m")
    with pytest.raises(KeepError, match="this model has no router; it has embedding, attention, mlp"):
        load_model(tmp_path / "m", "float32", CPU, keep="mlp,router=int8")
    load_model(tmp_path / "m", "float32", CPU, keep="head=int8")  # which is its embedding


def test_every_matrix_belongs_to_a_part() -> None:
    from dsc_serve.model.decoder import tensor_shapes

    for kind in ("dsc", "moe", "molora", "dense"):
        model = small_config(kind, tie_word_embeddings=False)
        assert all((part_of(name) is not None) == (len(shape) > 1) for name, shape in tensor_shapes(model).items())


@pytest.mark.timeout(300)
def test_a_file_takes_hardly_more_memory_than_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantising(monkeypatch, (Kind.Q4_1,))
    model = config(hidden_size=1024, head_dim=64, num_attention_heads=16, num_hidden_layers=8, ffn={"size": 4096})
    file = tmp_path / "m.gguf"
    write(file, wide_tensors(model), model, byte_level_vocabulary(), quantised=False)
    size = file.stat().st_size
    grown, held = resident_growth(file)
    assert size > 60e6
    assert held <= size
    assert grown <= 1.3 * size, (grown, size)
