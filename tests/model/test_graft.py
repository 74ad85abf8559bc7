"""Models of gated MLPs with an empty branch: the same logits, bit for bit; what can have none is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.families import PROMPTS, family_folder
from support.small_models import small_config, wide_tensors
from support.tenants import random_tenant
from test_import_gguf import byte_level_vocabulary
from test_import_gguf import config as gguf_config
from test_import_gguf import write as write_gguf

from dsc_serve import LLM
from dsc_serve.adapter_choice import BrokenAdapterError
from dsc_serve.cli import main
from dsc_serve.model.adapter_kinds import read_adapter
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.config import CheckpointError, DscConfig, load_config
from dsc_serve.model.gguf import import_gguf
from dsc_serve.model.graft import graft, layers_of
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.model.tenant import FILE, write_tenant

CONTEXT = 64  # tokens: of some families it decides the angles
FAMILIES = ["qwen3", "gemma2", "phi3", "olmo2", "granite", "smollm3", "mistral with a window"]
GATED: dict[str, Any] = {"mlp_gated": True, "hidden_act": "silu"}


def logits(model: Path, dtype: str, **options: Any) -> list[torch.Tensor]:
    adapter = options.pop("adapter", None)
    with LLM(str(model), dtype=dtype, threads=1, context=CONTEXT, **options) as llm:
        return llm.logits(PROMPTS, adapter=adapter)


@pytest.mark.parametrize("layers", ["", "1-2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_branch_changes_no_bit(name: str, layers: str, tmp_path: Path) -> None:
    base = family_folder(name, tmp_path / "base")
    config = graft(base, tmp_path / "grafted", 50, 3, layers)
    banks = [isinstance(kind.ffn, DscConfig) for kind in config.layers]
    assert banks == [not layers or i in (1, 2) for i in range(len(banks))]
    assert load_config(tmp_path / "grafted").layers[-1].ffn == config.layers[-1].ffn
    for dtype in ("float32", "bfloat16"):
        assert all(map(torch.equal, logits(tmp_path / "grafted", dtype), logits(base, dtype)))


@pytest.mark.parametrize("name", ["qwen3", "phi3", "granite"])
def test_adapters_and_tenants_of_the_family_serve_on_it(name: str, tmp_path: Path) -> None:
    """Adapters under the family's names do what they do on the base; tenants do something, and not the same."""
    base = family_folder(name, tmp_path / "base")
    config = graft(base, tmp_path / "grafted", 50, 3)
    source = open_source(base)
    generator = torch.Generator().manual_seed(1)
    modules = {
        own.name: Matrices(
            torch.randn(2, own.into, generator=generator), 0.1 * torch.randn(own.out, 2, generator=generator)
        )
        for own in Base(source.config, source.origin).modules.values()
    }
    write_adapter(tmp_path / "adapters" / "lora", "base", 2.0, modules)
    tenant, ffn = random_tenant(config, 1), config.ffn
    assert isinstance(ffn, DscConfig) and len(ffn.bank) == 16
    write_tenant(tmp_path / "adapters" / "tenant", tenant.bias, tenant.gamma, ffn.bank)
    folder = str(tmp_path / "adapters")
    want = logits(base, "float32", adapters=folder, adapter="lora")
    assert all(map(torch.equal, logits(tmp_path / "grafted", "float32", adapters=folder, adapter="lora"), want))
    got = logits(tmp_path / "grafted", "float32", adapters=folder, adapter="tenant")
    plain = logits(base, "float32")
    assert not any(torch.allclose(one, other, rtol=1e-2) for one, other in zip(got, plain, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "a model of the family GPT2LMHeadModel, and its MLP has no gate"),
        ("gptneox", "of the family GPTNeoXForCausalLM, and its MLP has no gate"),
        ("falcon", "of the family FalconForCausalLM, and its MLP has no gate"),
        ("mixtral", "of the family MixtralForCausalLM, and ffn.kind is 'moe'"),
        ("qwen2moe with dense layers", "of the family Qwen2MoeForCausalLM, and ffn.kind is 'moe'"),
        ("granite tied with biases", "of the family GraniteForCausalLM, and its MLP has biases"),
    ],
)
def test_other_families_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    base = family_folder(name, tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        graft(base, tmp_path / "grafted", 50, 3)
    assert not (tmp_path / "grafted").exists()


def own_base(folder: Path) -> Path:
    config = small_config("dense", {"size": 40}, **GATED, vocab_size=67, max_position_embeddings=64)
    save_checkpoint(config, wide_tensors(config), folder)
    return folder


def test_models_of_this_servers_form_can_be_grafted_once(tmp_path: Path) -> None:
    base = own_base(tmp_path / "base")
    result = CliRunner().invoke(
        main, ["graft", str(base), "--atoms", "20", "--picks", "2", "--layers", "1", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "20 atoms, 2 picked, beside 1 of 2 MLPs" in result.output
    assert all(map(torch.equal, logits(tmp_path / "out", "float32"), logits(base, "float32")))
    with pytest.raises(CheckpointError, match=r"ffn.kind is 'dsc'"):
        graft(tmp_path / "out", tmp_path / "again", 20, 2)
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        graft(base, tmp_path / "out", 20, 2)


def test_weights_in_fewer_bits_stay_as_they_are(tmp_path: Path) -> None:
    base = own_base(tmp_path / "base")
    result = CliRunner().invoke(main, ["quantize", str(base), "--weights", "int8", "--out", str(tmp_path / "int8")])
    assert result.exit_code == 0, result.output
    config = graft(tmp_path / "int8", tmp_path / "grafted", 20, 2)
    stored = load_file(tmp_path / "grafted" / "model.safetensors")
    assert stored["model.layers.0.mlp.static.up_proj.weight.values"].dtype == torch.int8
    assert all(map(torch.equal, logits(tmp_path / "grafted", "float32"), logits(tmp_path / "int8", "float32")))
    result = CliRunner().invoke(
        main, ["quantize", str(tmp_path / "grafted"), "--weights", "int8", "--out", str(tmp_path / "again")]
    )
    assert result.exit_code == 0, result.output
    again = load_config(tmp_path / "again")
    assert isinstance(again.ffn, DscConfig) and isinstance(config.ffn, DscConfig)
    assert again.ffn.bank == config.ffn.bank, "its tenants are still its tenants"
    assert all(map(torch.equal, logits(tmp_path / "again", "float32"), logits(tmp_path / "int8", "float32")))


def test_a_gguf_file_is_grafted_as_it_is_imported(tmp_path: Path) -> None:
    """Blocks dequantised, with its tokenizer, and adapters under its family's names."""
    model = gguf_config()
    write_gguf(tmp_path / "m.gguf", wide_tensors(model), model, byte_level_vocabulary())
    words = ["graft", str(tmp_path / "m.gguf"), "--atoms", "20", "--picks", "2"]
    for dtype in ("float32", "bfloat16"):
        import_gguf(tmp_path / "m.gguf", tmp_path / f"imported-{dtype}", getattr(torch, dtype))
        result = CliRunner().invoke(main, [*words, "--dtype", dtype, "--out", str(tmp_path / dtype)])
        assert result.exit_code == 0, result.output
        stored, imported = (load_file(tmp_path / name / "model.safetensors") for name in (dtype, f"imported-{dtype}"))
        block, same = "model.layers.0.mlp.static.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
        assert stored[block].dtype == getattr(torch, dtype) and torch.equal(stored[block], imported[same])
    assert all(
        map(torch.equal, logits(tmp_path / "float32", "float32"), logits(tmp_path / "imported-float32", "float32"))
    )
    own, base = (open_source(tmp_path / name) for name in ("float32", "imported-float32"))
    assert own.texts() == base.texts() and own.texts()
    assert Base(own.config, own.origin).modules.keys() == Base(base.config, base.origin).modules.keys()


def test_a_model_with_branches_beside_some_layers_is_quantised(tmp_path: Path) -> None:
    config = graft(own_base(tmp_path / "base"), tmp_path / "grafted", 20, 2, "1")
    result = CliRunner().invoke(
        main, ["quantize", str(tmp_path / "grafted"), "--weights", "int8", "--out", str(tmp_path / "int8")]
    )
    assert result.exit_code == 0, result.output
    kinds = [kind.ffn.kind for kind in load_config(tmp_path / "int8").layers]
    assert kinds == [kind.ffn.kind for kind in config.layers] == ["dense", "dsc"]
    assert all(one.isfinite().all() for one in logits(tmp_path / "int8", "float32"))


def test_a_bank_has_a_name_and_comes_of_the_seed(tmp_path: Path) -> None:
    base = own_base(tmp_path / "base")
    names = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = graft(base, tmp_path / folder, 20, 2, seed=seed)
        assert isinstance(config.ffn, DscConfig)
        names.append(config.ffn.bank)
    assert names[0] == names[1] != names[2]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["ffn"]["bank"] == names[0]


@pytest.mark.parametrize("text", ["x", "1-", "3-2", "0,7", "-1", "2--3", "99999999"])
def test_lists_of_layers_say_what_is_wrong(text: str) -> None:
    with pytest.raises(CheckpointError, match="layers is"):
        layers_of(text, 7)
    assert layers_of(" 0, 2-3 ,3", 7) == [0, 2, 3] and layers_of("", 2) == [0, 1]


def test_tenants_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = graft(own_base(tmp_path / "base"), tmp_path / "grafted", 20, 2)
    ffn = config.ffn
    assert isinstance(ffn, DscConfig)
    b, gamma = torch.zeros(2, 20), torch.ones(2, 32)
    one = tmp_path / "one"

    def refused(message: str, base: Any = config) -> None:
        with pytest.raises(BrokenAdapterError, match=message) as caught:
            read_adapter(one, base)
        assert str(tmp_path) not in str(caught.value)

    write_tenant(one, b, gamma, ffn.bank)
    assert (read_adapter(one, config).kind, read_adapter(one, config).changed) == ("dsc", 2)
    refused("a tenant of a bank, and the model has none", load_config(tmp_path / "base"))
    write_tenant(one, b, gamma, "another")
    refused(f"it is of the bank 'another'; the model has '{ffn.bank}'")
    write_tenant(one, b[:1], gamma, ffn.bank)
    refused(r"tensor b is float32 \[1, 20\], expected float32 \[2, 20\]")
    write_tenant(one, b, gamma[:, :1], ffn.bank)
    refused(r"tensor gamma is float32 \[2, 1\], expected float32 \[2, 32\]")
    write_tenant(one, b, gamma * float("nan"), ffn.bank)
    refused("tensor gamma holds 64 values that are not finite")
    (one / FILE).write_bytes(b"nonsense")
    refused("not a readable safetensors file")


def test_banks_that_differ_and_mixtures_beside_them_are_refused() -> None:
    dsc = {"kind": "dsc", "num_atoms": 10, "atoms_per_token": 2, "static_size": 8}
    moe = {"kind": "moe", "num_experts": 2, "experts_per_token": 1, "expert_size": 8}
    for other in ({**dsc, "num_atoms": 11}, moe):
        with pytest.raises(ValueError, match="those of kind 'dsc' must have the same, and others be 'dense'"):
            small_config("dsc", dsc, layer_kinds=[{}, {"ffn": other}], layer_pattern=[0, 1])
