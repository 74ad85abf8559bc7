"""Adapters of PEFT's form: what is read acts as PEFT has it act, and what would not is refused by its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import CASES, adapter_folder, adapter_tensors, expected
from support.families import NEW_TOKENS, PROMPTS, chosen, family_folder
from support.family_files import family_file
from support.small_models import small_config, wide_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsc_serve import LLM, SamplingParams
from dsc_serve.adapter_choice import BrokenAdapterError
from dsc_serve.model.adapter import Adapter, check_fits
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.folder import write_source
from dsc_serve.model.peft import read_adapter

# tests of what transformers and PEFT give: the largest difference of a logit, of which most lie between -3 and 3
CLOSE = 1e-4


def read(case: str, base: Path, folder: Path, **changes: Any) -> Adapter:
    source = open_source(base)
    return read_adapter(adapter_folder(case, folder, **changes), source.config, source.origin)


def merged(base: Path, adapter: Adapter, out: Path) -> Path:
    """The base with the adapter added to its weights, in the serving form."""
    source = open_source(base)
    tensors = {name: tensor.float() for name, tensor in source.weights().items()}
    named = {"q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "o": "self_attn.o"}
    for (layer, module), own in adapter.modules.items():
        below = [named[module]] if module in named else [f"mlp.{module}", f"mlp.shared_expert.{module}"]
        names = [name for part in below if (name := f"model.layers.{layer}.{part}_proj.weight") in tensors]
        assert len(names) == 1
        tensors[names[0]] = tensors[names[0]] + own.scale * own.up.float() @ own.down.float()
    save_checkpoint(source.config, tensors, out, source.path)
    return out


def check_answers(case: str, model: Path, **options: Any) -> None:
    want = expected(case)
    with LLM(str(model), dtype="float32", threads=1, max_running=4, **options) as llm:
        found = llm.logits(PROMPTS)
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        greedy = [output.token_ids for output in llm.generate(PROMPTS, params)]
    for i, prompt in enumerate(PROMPTS):
        assert (found[i][chosen(len(prompt))] - want.logits[i]).abs().max() < CLOSE
    assert greedy == want.greedy


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_read_and_merged_gives_what_peft_gives(case: str, tmp_path: Path) -> None:
    base = family_folder(CASES[case].base, tmp_path / "base")
    adapter = read(case, base, tmp_path / "tenant")
    assert adapter.name == "tenant"
    check_fits(adapter, open_source(base).config)
    check_answers(case, merged(base, adapter, tmp_path / "merged"))


@pytest.mark.parametrize("case", ["granite all linear", "phi3 fused", "gptneox", "gpt2", "falcon new"])
@pytest.mark.parametrize("form", ["imported", "gguf"])
def test_adapters_fit_a_base_in_whatever_form_it_was_brought(case: str, form: str, tmp_path: Path) -> None:
    """An import folds and splits the base's weights, and a GGUF file has them in other orders."""
    folder = family_folder(CASES[case].base, tmp_path / "base")
    if form == "gguf":
        base = family_file(CASES[case].base, tmp_path / "base.gguf")
    else:
        write_source(open_source(folder), base := tmp_path / "imported")
    same, own = read(case, folder, tmp_path / "tenant"), read(case, base, tmp_path / "tenant")
    assert own.digest == same.digest
    check_answers(case, merged(base, own, tmp_path / "merged"))


def test_the_digest_is_of_what_an_adapter_does(tmp_path: Path) -> None:
    base = family_folder("qwen3", tmp_path / "base")
    case = "qwen3 by patterns"
    one = read(case, base, tmp_path / "one")
    assert read(case, base, tmp_path / "other", base_model_name_or_path="elsewhere").digest == one.digest
    assert read(case, base, tmp_path / "scaled", lora_alpha=7).digest != one.digest
    tensors = adapter_tensors(case)
    name = sorted(tensors)[5]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 1e-6
    source = open_source(base)
    changed = read_adapter(adapter_folder(case, tmp_path / "changed", tensors), source.config, source.origin)
    assert changed.digest != one.digest


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    base = family_folder("phi3", tmp_path / "base")
    adapter = read("phi3 fused", base, tmp_path / "tenant")
    assert adapter.rank == 3
    assert adapter.nbytes == sum(tensor.nbytes for tensor in adapter_tensors("phi3 fused").values())  # A is shared


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_narrow_tensors_keep_their_numbers(dtype: torch.dtype, kept: torch.dtype, tmp_path: Path) -> None:
    source = open_source(family_folder("qwen3", tmp_path / "base"))
    tensors = {name: tensor.to(dtype) for name, tensor in adapter_tensors("qwen3 by patterns").items()}
    folder = adapter_folder("qwen3 by patterns", tmp_path / "tenant", tensors)
    adapter = read_adapter(folder, source.config, source.origin)
    assert {own.down.dtype for own in adapter.modules.values()} == {kept}
    own = adapter.modules[0, "q"]
    stored = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(own.up.double(), stored.double())


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
Tensors = dict[str, Tensor]


def dropped(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def poisoned(tensors: Tensors) -> None:
    tensors[Q0.format("B")] = tensors[Q0.format("B")].clone()
    tensors[Q0.format("B")][1, 2] = float("nan")


def enormous(tensors: Tensors) -> None:
    for part in "AB":
        tensors[Q0.format(part)] = torch.full_like(tensors[Q0.format(part)], 1e30)


# By what an error must say: changes of the config, and of the tensors.
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], None] | None]] = {
    "use_dora is True: DoRA": ({"use_dora": True}, None),
    "modules_to_save is ['lm_head']": ({"modules_to_save": ["lm_head"]}, None),
    "lora_bias is True": ({"lora_bias": True}, None),
    "bias is 'all'": ({"bias": "all"}, None),
    "bias is 'lora_only'": ({"bias": "lora_only"}, None),
    "trainable_token_indices is [3]": ({"trainable_token_indices": [3]}, None),
    "target_parameters is ['experts": ({"target_parameters": ["experts.gate_up_proj"]}, None),
    "layer_replication is [[0, 2], [1, 3]]": ({"layer_replication": [[0, 2], [1, 3]]}, None),
    "use_qalora is True": ({"use_qalora": True}, None),
    "use_bdlora is {": ({"use_bdlora": {"nblocks": 2}}, None),
    "alora_invocation_tokens is [5, 6]": ({"alora_invocation_tokens": [5, 6]}, None),
    "arrow_config is {": ({"arrow_config": {"top_k": 2}}, None),
    "kasa_config is {": ({"kasa_config": {"beta": 1}}, None),
    "velora_config is {": ({"velora_config": {"r": 1}}, None),
    "monteclora_config is {": ({"monteclora_config": {"num_samples": 2}}, None),
    "megatron_config is {": ({"megatron_config": {"a": 1}}, None),
    "fan_in_fan_out is True": ({"fan_in_fan_out": True}, None),
    "init_lora_weights is 'pissa_niter_4'": ({"init_lora_weights": "pissa_niter_4"}, None),
    "init_lora_weights is 'olora'": ({"init_lora_weights": "olora"}, None),
    "init_lora_weights is 'corda'": ({"init_lora_weights": "corda"}, None),
    "init_lora_weights is 'lora_ga'": ({"init_lora_weights": "lora_ga"}, None),
    "init_lora_weights is 'loftq'": ({"init_lora_weights": "loftq"}, None),
    "task_type is 'SEQ_CLS'": ({"task_type": "SEQ_CLS"}, None),
    "peft_type is 'IA3'": ({"peft_type": "IA3"}, None),
    "peft_type is ['LORA']": ({"peft_type": ["LORA"]}, None),
    "base_model": ({"base_model": "x"}, None),
    "exclude_modules is 5": ({"exclude_modules": 5}, None),
    "layers_pattern is 'layers', but": ({"layers_pattern": "layers"}, None),
    "'a_new_trick' is 0.5": ({"a_new_trick": 0.5}, None),
    "r is 0": ({"r": 0}, None),
    "r is True": ({"r": True}, None),
    "r is 1000000": ({"r": 1000000}, None),
    "lora_alpha is nan": ({"lora_alpha": float("nan")}, None),
    "lora_alpha is 0": ({"lora_alpha": 0}, None),
    "use_rslora is 'yes'": ({"use_rslora": "yes"}, None),
    "rank_pattern['o_proj'] is 2.5": ({"rank_pattern": {"o_proj": 2.5}}, None),
    "rank_pattern names 'up_proj'": ({"rank_pattern": {"up_proj": 3}}, None),
    "alpha_pattern names 'lm_head'": ({"alpha_pattern": {"lm_head": 3}}, None),
    "rank_pattern: '(?=x)' is not a pattern": ({"rank_pattern": {"(?=x)": 3}}, None),
    "target_modules is None": ({"target_modules": None}, None),
    "target_modules is ['q_proj', 3]": ({"target_modules": ["q_proj", 3]}, None),
    "target_modules names 'fc1'": ({"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "fc1"]}, None),
    "target_modules: '(' is not a pattern": ({"target_modules": "("}, None),
    "layers_to_transform names layer 9": ({"layers_to_transform": [0, 1, 2, 9]}, None),
    "layers_to_transform is [-1]": ({"layers_to_transform": [-1]}, None),
    "there are tensors of model.layers.0.mlp.down_proj": ({"target_modules": ["q_proj", "k_proj", "o_proj"]}, None),
    "which target_modules and its like do not name": ({"layers_to_transform": [0, 1]}, None),
    "of which there are no tensors": ({"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "v_proj"]}, None),
    "shape [7, 48]; [4, 48] is expected": ({"rank_pattern": {"o_proj": 2, r".*\.2\.mlp\.down_proj": 5}}, None),
    "has shape [3, 48]; [7, 48] is expected": ({}, put(Q0.format("A"), torch.zeros(3, 48))),
    "has shape [64, 8]; [64, 7] is expected": ({}, put(Q0.format("B"), torch.zeros(64, 8))),
    "but not its counterpart of part B": ({}, dropped(Q0.format("B"))),
    "lora_B.weight holds 1 values that are not finite": ({}, poisoned),
    "may reach": ({}, enormous),
    "is stored as int8": ({}, put(Q0.format("A"), torch.zeros(7, 48, dtype=torch.int8))),
    "lora_magnitude_vector.weight: DoRA": ({}, put(Q0.format("magnitude_vector"), torch.ones(64))),
    "lora_B.bias: biases": ({}, put(Q0.format("B").replace("weight", "bias"), torch.ones(64))),
    "it is a whole tensor of the base": ({}, put("base_model.model.lm_head.weight", torch.ones(67, 48))),
    "rows of the embedding": (
        {},
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(1, 48)),
    ),
    "embeddings are not adapted": ({}, put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 67))),
    "the adapter's name stands in it": ({}, put(Q0.format("A").replace("weight", "default.weight"), torch.ones(7, 48))),
    "it is no part of a LORA adapter": ({}, put("notes", torch.ones(2))),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_would_act_otherwise_is_refused_by_its_name(told: str, tmp_path: Path) -> None:
    source = open_source(family_folder("qwen3", tmp_path / "base"))
    changes, change = REFUSED[told]
    tensors = adapter_tensors("qwen3 by patterns")
    if change is not None:
        change(tensors)
    folder = adapter_folder("qwen3 by patterns", tmp_path / "tenant", tensors, **changes)
    with pytest.raises(BrokenAdapterError) as error:
        read_adapter(folder, source.config, source.origin)
    assert told in error.value.reason
    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("lm_head", "the head is not adapted here"),
        ("model.layers.0.mlp.experts.0.gate_proj", "experts are not adapted here"),
        ("model.layers.1.mlp.gate", "routers are not adapted here"),
        ("model.layers.77.self_attn.q_proj", "matches nothing in the base model"),
        ("layers.0.self_attn.q_proj", "matches nothing in the base model"),
        ("model.layers.0.self_attn.qkv_proj", "matches nothing in the base model"),
        ("model.layers.0.self_attn.q_norm", "norms are not adapted here"),
    ],
)
def test_a_module_that_matches_nothing_is_an_error(module: str, told: str, tmp_path: Path) -> None:
    source = open_source(family_folder("qwen2moe", tmp_path / "base"))
    folder = tmp_path / "tenant"
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    parts = {f"base_model.model.{module}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(parts, folder / "adapter_model.safetensors")
    with pytest.raises(BrokenAdapterError) as error:
        read_adapter(folder, source.config, source.origin)
    assert told in error.value.reason and module in error.value.reason


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("adapter_config.json", None, "adapter_config.json: no such file"),
        ("adapter_config.json", b"{", "adapter_config.json: not readable JSON"),
        ("adapter_config.json", b"[" * 100000, "nested too deeply"),
        ("adapter_config.json", b"[]", "expected a JSON object"),
        ("adapter_model.safetensors", None, "adapter_model.bin is a pickle, which is never read"),
        ("adapter_model.safetensors", b"", "not a readable safetensors file"),
        ("adapter_model.safetensors", b"\xff" * 64, "not a readable safetensors file"),
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_files_that_are_not_what_their_names_say(file: str, content: bytes | None, told: str, tmp_path: Path) -> None:
    source = open_source(family_folder("qwen3", tmp_path / "base"))
    folder = adapter_folder("qwen3 by patterns", tmp_path / "tenant")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(BrokenAdapterError) as error:
        read_adapter(folder, source.config, source.origin)
    assert told in error.value.reason


def test_an_expression_that_would_take_for_ever_does_not(tmp_path: Path) -> None:
    source = open_source(family_folder("qwen3", tmp_path / "base"))
    folder = adapter_folder("qwen3 by patterns", tmp_path / "tenant", target_modules="(([a-z._0-9]+)+)+x" * 20)
    began = time.monotonic()
    with pytest.raises(BrokenAdapterError):
        read_adapter(folder, source.config, source.origin)
    assert time.monotonic() - began < 20


def test_a_mixture_that_names_vectors_beyond_its_bank_is_refused(tmp_path: Path) -> None:
    case = "vblora kept mixtures"
    source = open_source(family_folder("qwen3", tmp_path / "base"))
    tensors = adapter_tensors(case)
    name = next(own for own in tensors if own.endswith("A_topk_indices"))
    tensors[name] = torch.full_like(tensors[name], 20)
    with pytest.raises(BrokenAdapterError, match="beyond the bank's 20"):
        read_adapter(adapter_folder(case, tmp_path / "tenant", tensors), source.config, source.origin)
    del tensors["base_model.vblora_vector_bank"]
    with pytest.raises(BrokenAdapterError, match="vblora_vector_bank is missing"):
        read_adapter(adapter_folder(case, tmp_path / "other", tensors), source.config, source.origin)


@pytest.mark.parametrize("case", ["vblora", "vblora kept mixtures"])
def test_mixtures_take_no_more_memory_for_more_picks(case: str, tmp_path: Path) -> None:
    """Not so many times the matrix: no tensor that is made meanwhile is larger than what is kept, or what is stored."""
    source = open_source(family_folder("qwen3", tmp_path / "base"))
    folder = adapter_folder(case, tmp_path / "tenant")
    with Largest() as made:
        adapter = read_adapter(folder, source.config, source.origin)
    assert made.floats <= max(max(own.up.numel(), own.down.numel()) for own in adapter.modules.values())


class Largest(TorchDispatchMode):
    """How many floating-point numbers with the length of a bank's vectors, 8, the largest tensor made meanwhile has."""

    floats = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.dim() > 2 and out.shape[-1] == 8:
            self.floats = max(self.floats, out.numel())
        return out


@pytest.mark.parametrize(("kind", "below"), [("dsc", "static."), ("molora", "static."), ("dense", "")])
def test_models_made_in_the_serving_form_have_its_names(kind: str, below: str, tmp_path: Path) -> None:
    config = small_config(kind)
    save_checkpoint(config, wide_tensors(config), tmp_path / "base")
    source = open_source(tmp_path / "base")
    assert source.origin is None
    folder = tmp_path / "tenant"
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    stored = {}
    hidden = 40 if kind == "dense" else 24
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.{below}up_proj"
        stored |= {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(hidden, 2)}
    save_file(stored, folder / "adapter_model.safetensors")
    adapter = read_adapter(folder, source.config)
    assert set(adapter.modules) == {(0, "up"), (1, "up")}
    assert adapter.modules[0, "up"].scale == 1.5
