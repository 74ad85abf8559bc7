"""An adapter of every module of every family does what the base does once its stored weights have been changed so, and
its core on a basis does what it does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CASES, PROMPTS, family_folder

from dsc_serve import LLM
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.cores.share import share
from dsc_serve.model.peft.modules import Base

ALPHA, RANK = 3.0, 2
CLOSE = 1e-4  # of the largest logit
CONTEXT = 64  # tokens: of some families it decides the angles


def changed(base: Path, tenant: Path, out: Path) -> int:
    """Write an adapter of all modules to `tenant`, and to `out` the base that it makes; returns its modules' number."""
    source = open_source(base)
    own = Base(source.config, source.origin)
    weights, update, random = load_file(base / "model.safetensors"), {}, torch.Generator().manual_seed(7)
    for name, module in own.modules.items():
        down, up = (torch.randn(n, RANK, generator=random) * n**-0.5 for n in (module.into, module.out))
        update |= {f"base_model.model.{name}.lora_A.weight": down.T.contiguous()}
        update |= {f"base_model.model.{name}.lora_B.weight": up}
        key = next(key for key in weights if f"{name}.weight".endswith(key))
        delta = ALPHA / RANK * (up @ down.T)
        weights[key] = weights[key].float() + (delta.T if own.transposed else delta)
    tenant.mkdir(parents=True)
    names = sorted({name.rpartition(".")[2] for name in own.modules})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": names, "bias": "none"}
    if own.transposed:
        config["fan_in_fan_out"] = True
    (tenant / "adapter_config.json").write_text(json.dumps(config))
    save_file(update, tenant / "adapter_model.safetensors", metadata={"format": "pt"})
    out.mkdir()
    (out / "config.json").write_text((base / "config.json").read_text())
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return len(own.modules)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_all_modules_is_the_base_with_changed_weights(name: str, tmp_path: Path) -> None:
    base = family_folder(name, tmp_path / "base")
    assert changed(base, tmp_path / "adapters" / "tenant", tmp_path / "changed") > 0
    with LLM(str(tmp_path / "changed"), dtype="float32", threads=1, context=CONTEXT) as llm:
        wanted = llm.logits(PROMPTS)
    with LLM(str(base), dtype="float32", threads=1, context=CONTEXT, adapters=str(tmp_path / "adapters")) as llm:
        found, plain = llm.logits(PROMPTS, adapter="tenant"), llm.logits(PROMPTS)
    for own, want, without in zip(found, wanted, plain, strict=True):
        assert (own - want).abs().max() < CLOSE * want.abs().max()
        assert (own - without).abs().max() > 100 * CLOSE * want.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_core_of_all_modules_does_what_its_adapter_does(name: str, tmp_path: Path) -> None:
    """Whatever the family joins, reorders, transposes or multiplies: the basis has been brought as the base's rows."""
    base = family_folder(name, tmp_path / "base")
    count = changed(base, tmp_path / "adapters" / "tenant", tmp_path / "changed")
    (tmp_path / "adapters" / "tenant").rename(tmp_path / "adapters" / "lora")
    found = share([tmp_path / "adapters" / "lora"], tmp_path / "shared", RANK, None)
    assert len(found.adapters["lora"].cores) == count
    for own in (tmp_path / "shared").iterdir():
        own.rename(tmp_path / "adapters" / ("core" if own.is_dir() else own.name))
    with LLM(str(base), dtype="float32", threads=1, context=CONTEXT, adapters=str(tmp_path / "adapters")) as llm:
        wanted, cored = (llm.logits(PROMPTS, adapter=one) for one in ("lora", "core"))
    for own_logits, want in zip(cored, wanted, strict=True):
        assert (own_logits - want).abs().max() < CLOSE * want.abs().max()
