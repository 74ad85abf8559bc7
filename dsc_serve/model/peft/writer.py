"""Low-rank updates written in PEFT's form, for its tools and for other servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.peft import config, tensors
from dsc_serve.model.peft.tensors import Matrices


def write_adapter(
    folder: Path, base: str, alpha: float, modules: Mapping[str, Matrices], fan_in_fan_out: bool = False
) -> None:
    """Write updates of one rank by the modules' names in the base; `base` is what it is called.

    Both files appear whole or not at all. Raises CheckpointError where the ranks differ.
    """
    ranks = {own.down.shape[0] for own in modules.values()}
    if len(ranks) != 1:
        raise CheckpointError(f"{folder}: the ranks are {sorted(ranks)}; one is written")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
    }
    stored: dict[str, Tensor] = {}
    for name, own in modules.items():
        stored[f"{tensors.PREFIX}{name}.lora_A.weight"] = own.down.contiguous()
        stored[f"{tensors.PREFIX}{name}.lora_B.weight"] = own.up.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{tensors.FILE}.new"
    save_file(stored, new, metadata={"format": "pt"})
    new.replace(folder / tensors.FILE)
    new = folder / f".{config.FILE}.new"
    new.write_text(json.dumps(content, indent=2) + "\n", "utf8")
    new.replace(folder / config.FILE)
