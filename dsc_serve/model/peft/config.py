"""`adapter_config.json`: what is read of it, and what is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_serve.files import CheckpointError
from dsc_serve.model.config import read_json
from dsc_serve.model.patterns import ending
from dsc_serve.model.peft.targets import MOST, Targets, pattern, read_targets, short

FILE = "adapter_config.json"
MAX_RANK = 4096
NOTHING: tuple[Any, ...] = (None, False, "", [], {})

# Fields by whose value an adapter is more than low-rank updates of matrices, or another one.
REFUSED = {
    "use_dora": "DoRA rescales the base's columns; merge it into the base",
    "modules_to_save": "it brings whole modules in place of the base's; merge it into the base",
    "lora_bias": "biases of LoRA's matrices are not served",
    "trainable_token_indices": "it brings rows of the embedding; merge it into the base",
    "target_parameters": "it adapts parameters that are no linear modules, as stacked experts are",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA is not served",
    "alora_invocation_tokens": "activated LoRA begins to act within a prompt",
    "arrow_config": "Arrow routes tokens among adapters",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA is not served",
    "monteclora_config": "MonteCLoRA is not served",
    "megatron_config": "Megatron's parallel layers have other names",
}
# Fields that decide nothing once an adapter has been trained, or that are looked at one by one.
KNOWN = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "bias", "fan_in_fan_out", "layers_to_transform"),
    *("layers_pattern", "runtime_config"),
}
KNOWN_LORA = KNOWN | {
    *("lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("ensure_weight_tying",),
}
KNOWN_VBLORA = KNOWN | {
    *("num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout"),
    *("init_vector_bank_bound", "init_logits_std"),
}
FORMS = {"LORA": KNOWN_LORA, "VBLORA": KNOWN_VBLORA}
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # that leave the base's weights alone


@dataclass(frozen=True)
class Pattern:
    """An entry of `rank_pattern` or `alpha_pattern`."""

    text: str
    matches: Callable[[str], bool]
    value: float


@dataclass(frozen=True)
class AdapterConfig:
    """What a configuration claims."""

    content: Mapping[str, Any]
    form: str  # of FORMS
    base: str  # the name that it gives its base
    targets: Targets
    fan_in_fan_out: bool  # see `modules`
    rank: int
    alpha: float
    rslora: bool
    ranks: tuple[Pattern, ...]
    alphas: tuple[Pattern, ...]

    def rank_of(self, module: str) -> int:
        return int(first(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Of a module's update, before anything that the base's own form adds."""
        if self.form != "LORA":
            return 1.0
        rank, alpha = self.rank_of(module), first(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def size(self, name: str, most: int = 2**24) -> int:
        """A field that must be a whole number above 0. Raises CheckpointError."""
        return size(self.content, name, most)


def first(patterns: tuple[Pattern, ...], module: str, default: float) -> float:
    return next((own.value for own in patterns if own.matches(module)), default)


def read_config(folder: Path) -> AdapterConfig:
    """Raises CheckpointError that names the field, its value and what is allowed."""
    content = read_json(folder / FILE)
    form = content.get("peft_type")
    if not isinstance(form, str) or form not in FORMS:
        way = "; PEFT's save_as_lora writes many others as LORA"
        raise CheckpointError(f"peft_type is {short(form)}; supported: {', '.join(FORMS)}{way}")
    refuse(content, FORMS[form])
    lora = form == "LORA"
    if lora:
        start = content.get("init_lora_weights")
        if start not in STARTS:
            what = "it begins with other weights of the base than the base's own"
            way = "save it with path_initial_model_for_weight_conversion"
            raise CheckpointError(f"init_lora_weights is {short(start)}: {what}; {way}, which makes it a plain LoRA")
    return AdapterConfig(
        content=content,
        form=form,
        base=str(content.get("base_model_name_or_path") or ""),
        targets=read_targets(content),
        fan_in_fan_out=flag(content, "fan_in_fan_out"),
        rank=size(content, "r", MAX_RANK),
        alpha=number(content.get("lora_alpha"), "lora_alpha") if lora else 1.0,
        rslora=flag(content, "use_rslora") if lora else False,
        ranks=patterns(content, "rank_pattern") if lora else (),
        alphas=patterns(content, "alpha_pattern") if lora else (),
    )


def refuse(content: Mapping[str, Any], known: set[str]) -> None:
    """Raises CheckpointError for what is not served, and for what nobody here knows."""
    for name, why in REFUSED.items():
        if content.get(name) not in NOTHING:
            raise CheckpointError(f"{name} is {short(content[name])}: {why}")
    if content.get("bias", "none") not in ("none", None):
        raise CheckpointError(f"bias is {short(content['bias'])}: it brings biases of the base; supported: 'none'")
    if content.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"task_type is {short(content['task_type'])}; supported: 'CAUSAL_LM'")
    for name, value in content.items():
        if name not in known and name not in REFUSED and value not in NOTHING:
            raise CheckpointError(f"{short(name)} is {short(value)}: a field that is not known, and may change answers")


def patterns(content: Mapping[str, Any], name: str) -> tuple[Pattern, ...]:
    """Raises CheckpointError."""
    given = content.get(name) or {}
    if not isinstance(given, dict) or len(given) > MOST:
        raise CheckpointError(f"{name} is {short(given)}; expected numbers by modules' names, at most {MOST}")
    return tuple(
        Pattern(
            text,
            pattern(name, text, ending),
            size(given, text, MAX_RANK, name) if name == "rank_pattern" else number(value, f"{name}[{text!r}]"),
        )
        for text, value in given.items()
    )


def size(content: Mapping[str, Any], name: str, most: int, within: str = "") -> int:
    value = content.get(name)
    if type(value) is not int or not 1 <= value <= most:
        named = f"{within}[{short(name)}]" if within else name
        raise CheckpointError(f"{named} is {short(value)}; expected a whole number from 1 to {most}")
    return value


def number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= 1e6:
        raise CheckpointError(f"{name} is {short(value)}; expected a number other than 0, at most 1000000")
    return float(value)


def flag(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{name} is {short(value)}; expected true or false")
    return bool(value)
