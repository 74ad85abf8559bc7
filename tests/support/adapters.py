"""Adapters of the checkpoints of `families`, and what PEFT and transformers compute with them.

The expected values lie in tests/data/adapters, one file for each case: float32 logits of chosen positions of some
prompts and greedy continuations, with the `adapter_config.json` that PEFT wrote and the versions that gave them. They
are written again with an interpreter that has transformers and peft:

    PYTHONPATH=tests python -m support.adapters PYTHON [CASE ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.families import NEW_TOKENS, PROMPTS, Expected, chosen, family_folder, file_name
from support.small_models import DATA

EXPECTED = DATA / "adapters"


@dataclass(frozen=True)
class AdapterCase:
    """An adapter of a base model."""

    base: str  # of `families`
    config: dict[str, Any]  # of PEFT's LoraConfig, or with vblora of its VBLoRAConfig
    vblora: bool = False


VBLORA = {"r": 3, "num_vectors": 20, "vector_length": 8, "topk": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]}
PATTERNS = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
    "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 7, "o_proj": 2, r".*\.2\.mlp\.down_proj": 5},
    "alpha_pattern": {r"layers\.1\..*": 11, "down_proj": 3.5},
}
CASES: dict[str, AdapterCase] = {
    "granite all linear": AdapterCase("granite", {"r": 4, "lora_alpha": 5, "target_modules": "all-linear"}),
    "granite tied": AdapterCase(
        "granite tied with biases", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj", "o_proj"]}
    ),
    "qwen3 by patterns": AdapterCase("qwen3", PATTERNS),
    "qwen3 by patterns rank-stabilised": AdapterCase("qwen3", {**PATTERNS, "use_rslora": True}),
    "smollm3 some layers": AdapterCase(
        "smollm3", {"r": 3, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [0, 2]}
    ),
    "smollm3 but for some": AdapterCase(
        "smollm3", {"r": 3, "target_modules": "all-linear", "exclude_modules": r".*\.1\..*|.*k_proj"}
    ),
    "phi3 fused": AdapterCase("phi3", {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"}),
    "gpt2": AdapterCase("gpt2", {"r": 3, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gptneox": AdapterCase(
        "gptneox", {"r": 3, "lora_alpha": 4, "target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}
    ),
    "falcon": AdapterCase("falcon", {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"}),
    "falcon new": AdapterCase("falcon new", {"r": 3, "lora_alpha": 4, "target_modules": ["query_key_value"]}),
    "stablelm by an expression": AdapterCase(
        "stablelm in parallel",
        {"r": 3, "lora_alpha": 8, "target_modules": r"model\.layers\.\d+\.(self_attn\.[qo]|mlp\.up)_proj"},
    ),
    "olmo2 one layer": AdapterCase(
        "olmo2",
        {"r": 5, "lora_alpha": 5, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "mixtral attention": AdapterCase("mixtral", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
    "qwen2moe with dense layers": AdapterCase(
        "qwen2moe with dense layers",
        {"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "vblora": AdapterCase("qwen3", VBLORA, vblora=True),
    "vblora kept mixtures": AdapterCase("qwen3", {**VBLORA, "save_only_topk_weights": True}, vblora=True),
}


def apart(found: Tensor, want: Tensor) -> float:
    """The largest difference of logits, as a share of the largest of them."""
    return float((found - want).abs().max() / want.abs().max())


def drawn(name: str, tensor: str, shape: list[int]) -> np.ndarray:
    """Random numbers wide enough that each of them matters."""
    random = np.random.RandomState(sum(f"{name} {tensor}".encode()))
    return (0.5 * random.standard_normal(shape) / shape[-1] ** 0.25).astype(np.float32)


def read_metadata(name: str) -> dict[str, str]:
    with safe_open(EXPECTED / f"{file_name(name)}.safetensors", "pt") as file:
        return dict(file.metadata())


def adapter_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of a case under PEFT's names, drawn again, or where they depend on each other as PEFT stored them."""
    with safe_open(EXPECTED / f"{file_name(name)}.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        names = [own for own in file.keys() if own.startswith("adapter.")]  # noqa: SIM118  not a mapping
        kept = {own.removeprefix("adapter."): file.get_tensor(own) for own in names}
    return kept or {own: torch.from_numpy(drawn(name, own, shape)) for own, shape in shapes.items()}


def adapter_folder(name: str, out: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A case's adapter as a folder; changes: of its config, None leaves a field out."""
    out.mkdir(parents=True, exist_ok=True)
    content = {**json.loads(read_metadata(name)["config"]), **changes}
    (out / "adapter_config.json").write_text(json.dumps({key: own for key, own in content.items() if own is not None}))
    stored = adapter_tensors(name) if tensors is None else tensors
    save_file(stored, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def expected(name: str) -> Expected:
    with safe_open(EXPECTED / f"{file_name(name)}.safetensors", "pt") as file:
        parts = [(file.get_tensor(f"logits.{i}"), file.get_tensor(f"greedy.{i}")) for i in range(len(PROMPTS))]
    return Expected([logits for logits, _ in parts], [greedy.tolist() for _, greedy in parts])


PEFT = """
import json, sys, torch, transformers, peft, numpy as np
from pathlib import Path
from safetensors.torch import save_file, load_file
sys.path.insert(0, sys.argv[3])
from support.adapters import drawn
prompts, chosen, count = json.loads(sys.argv[2])
for name, folder, out, config, vblora in json.loads(sys.argv[1]):
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__}
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    kind = peft.VBLoRAConfig if vblora else peft.LoraConfig
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "lora_" in own:
                parameter.copy_(torch.from_numpy(drawn(name, own.replace(".default", ""), list(parameter.shape))))
                if "logits" in own:
                    parameter.mul_(4)
    saved = Path(folder) / "adapter"
    model.save_pretrained(saved)
    # as it comes back: saving sorts the patterns, of which the first that matches acts
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, saved).eval()
    tensors = load_file(saved / "adapter_model.safetensors")
    found, margin = {f"adapter.{own}": tensor for own, tensor in tensors.items()} if vblora else {}, 1e9
    for own, tensor in ({} if vblora else tensors).items():
        assert np.array_equal(tensor.numpy(), drawn(name, own, list(tensor.shape))), own
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            with model.disable_adapter():
                without = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            change = float((logits - without).norm() / without.norm())
            found[f"logits.{i}"] = logits[chosen[i]].clone()
            tokens = list(prompt)
            for _ in range(count):
                last = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
                top = last.topk(2).values
                margin = min(margin, float(top[0] - top[1]))
                tokens.append(int(last.argmax()))
            found[f"greedy.{i}"] = torch.tensor(tokens[len(prompt):])
    assert margin > 1e-3 and change > 0.02, (name, margin, change)
    content = json.loads((saved / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = name
    for own in ("target_modules", "exclude_modules"):
        if isinstance(content.get(own), list):
            content[own] = sorted(content[own])
    shapes = {own: list(tensor.shape) for own, tensor in tensors.items()}
    save_file(found, out, metadata={**versions, "config": json.dumps(content), "shapes": json.dumps(shapes)})
    print(name, "smallest margin", round(margin, 4), "change", round(change, 3), flush=True)
"""


def main(interpreter: str, *names: str) -> None:
    EXPECTED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            (
                name,
                str(family_folder(CASES[name].base, Path(folder) / file_name(name))),
                str(EXPECTED / f"{file_name(name)}.safetensors"),
                CASES[name].config,
                CASES[name].vblora,
            )
            for name in names or CASES
        ]
        prompts = [PROMPTS, [chosen(len(prompt)) for prompt in PROMPTS], NEW_TOKENS]
        tests = str(Path(__file__).parents[1])
        command = [interpreter, "-c", PEFT, json.dumps(asked), json.dumps(prompts), tests]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
