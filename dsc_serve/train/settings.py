"""What a training run needs to know: a TOML file, checked field by field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsc_serve.config import ConfigError
from dsc_serve.documents import DocumentError, parse_json, parse_toml, read_document
from dsc_serve.model.budget import ParameterBudget
from dsc_serve.model.config import CheckpointError, ModelConfig, MoeConfig, checked_config, one_line
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.model.schema import Size, Strict

MAX_SEED = 999_999
BUDGET_OFF = 0.03  # share by which a model's parameters may differ from what [budget] asks for
PRESETS = ("embedded", "paper", "smoke", "study")
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class TrainError(ValueError):
    """A run that cannot start or go on; one line that names what is wrong and what is expected."""


class DataSettings(Strict):
    """Where tokens come from."""

    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02  # share of every source that is never trained on
    # a tokenizer.json, or a folder with one; without it a byte-level BPE of the model's vocabulary is trained
    tokenizer: str | None = None
    sentences: Count = 0  # paragraphs of made-up sentences to train on where no text is named, for trying things out


class BudgetSettings(Strict):
    """FFN sizes by the paper's solver instead of [model.ffn]."""

    total: Positive
    active: Positive
    kind: Literal["dsc", "moe", "molora", "dense"] = "dsc"
    k: Size | None = None  # atoms, experts or adapters per token


class OptimiserSettings(Strict):
    """How the gradient becomes a step."""

    # AdamW for everything, or Muon for the hidden matrices and AdamW for the rest
    kind: Literal["adamw", "muon"] = "adamw"
    rate: Positive = 6e-4  # AdamW's peak rate
    hidden_rate: Positive = 6e-4  # Muon's, in units of an AdamW rate
    # "paper" is 5 times the rate, "script" the rate itself, to which the reference script falls back from its first
    # step on
    router_rate: Literal["paper", "script"] = "paper"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    momentum: Decay = 0.95
    weight_decay: NotNegative = 0.02
    clip: Positive = 1.0


class TrainingPhase(Strict):
    """Until this share of the run: windows of `length` tokens, `step_tokens` tokens a step."""

    until: Share = 1.0
    length: Size
    step_tokens: Size

    @model_validator(mode="after")
    def _whole_windows(self) -> TrainingPhase:
        if self.step_tokens % self.length:
            raise ValueError(f"step_tokens is {self.step_tokens}, not a multiple of length, {self.length}")
        return self


class ScheduleSettings(Strict):
    """The rate rises over `warmup` steps, holds until the share `hold` of the run and falls to `final` of its peak."""

    steps: Size = 2000  # the run's length, unless a time limit shapes it
    warmup: Count = 150
    hold: Share = 0.0
    shape: Literal["cosine", "linear"] = "cosine"
    final: Share = 0.1
    micro_tokens: Size = 8192  # most tokens in one backward pass
    phases: tuple[TrainingPhase, ...]

    @model_validator(mode="after")
    def _covers(self) -> ScheduleSettings:
        untils = [phase.until for phase in self.phases]
        if not untils or untils != sorted(untils) or untils[-1] != 1.0:
            raise ValueError(f"phases end at {untils}; expected rising shares of the run, the last one 1.0")
        return self


class LossSettings(Strict):
    """Weights of the training terms."""

    load: NotNegative = 0.01
    budget: NotNegative = 0.01
    frame: NotNegative = 0.001
    z: NotNegative = 1e-4
    z_of: Literal["raw", "clamped"] = "raw"  # logits as in the script, or as in the paper
    signal_floor: NotNegative = 1.0


class RunSettings(Strict):
    """How a run computes, and what it tells and stores."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; master weights are float32
    export: Literal["float32", "bfloat16"] = "bfloat16"  # dtype of the exported tensors
    threads: Count = 0
    log_steps: Size = 10  # steps between lines of the log
    evaluate_steps: Size = 250  # steps between looks at held-out windows
    evaluate_windows: Size = 2  # of every source
    checkpoint_s: Positive = 60.0  # seconds between checkpoints
    # steps between random restarts of the atoms that no token picked since the last (Dhariwal et al. 2020, "Jukebox");
    # 0 never does
    revive_steps: Count = 0
    revive_until: Share = 0.5  # share of the run after which none is revived
    samples: tuple[str, ...] = ()  # prompts whose continuations the run's report shows


class TrainSettings(Strict):
    """One run."""

    model: dict[str, Any]  # the fields of config.json, the FFN's left out where [budget] solves for it
    budget: BudgetSettings | None = None
    data: DataSettings = DataSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    schedule: ScheduleSettings
    losses: LossSettings = LossSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _ends(self) -> TrainSettings:
        for name in ("bos_token_id", "eos_token_id"):
            if name in self.model:
                raise ValueError(f"model.{name} is given, but the tokenizer gives it; leave it out")
        return self

    def model_config_for(self, eos_token_id: int | None) -> ModelConfig:
        """The architecture. Raises TrainError naming the field that is wrong."""
        fields = dict(self.model)
        heads = fields.get("num_attention_heads", 0)
        if isinstance(heads, int) and heads > 0 and isinstance(fields.get("hidden_size"), int):
            fields.setdefault("num_key_value_heads", heads)
            fields.setdefault("head_dim", fields["hidden_size"] // heads)
        if self.budget is not None:
            if "ffn" in fields:
                raise TrainError("[model.ffn] and [budget] both give the FFN's sizes; leave one out")
            fields["ffn"] = self._solved(fields)
        fields |= {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
        try:
            config = checked_config(fields, "[model]")
        except CheckpointError as error:
            raise TrainError(str(error)) from None
        check_trained(config)
        longest = max(phase.length for phase in self.schedule.phases)
        if longest > config.max_position_embeddings:
            raise TrainError(
                f"a phase's length is {longest}; max_position_embeddings allows {config.max_position_embeddings}"
            )
        if self.budget is not None:
            _check_budget(config, self.budget)
        return config

    def _solved(self, fields: dict[str, Any]) -> dict[str, Any]:
        b = self.budget
        assert b is not None
        names = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size")
        missing = [name for name in names if not isinstance(fields.get(name), int)]
        if missing:
            raise TrainError(f"[model] {missing[0]} is {fields.get(missing[0])!r}, expected a whole number")
        try:
            tied = fields.get("tie_word_embeddings", True) is True
            vocabulary, context, layers, width = (int(fields[name]) for name in names)
            budget = ParameterBudget(b.total, b.active, vocabulary, context, layers, width, tied)
            solve = getattr(budget, b.kind)
            ffn = solve() if b.k is None or b.kind == "dense" else solve(b.k)
        except ValueError as error:
            reason = one_line(error) if isinstance(error, ValidationError) else error
            raise TrainError(f"[budget] {reason}") from None
        solved: dict[str, Any] = ffn.model_dump()
        return solved


# What is served but not trained, and what there is instead.
TRAINED_FIELDS: dict[str, object] = {
    "norms": "before",
    "qk_norm": "none",
    "rotation": True,
    "rotary_dim": None,
    "window": 0,
    "attention_cap": 0.0,
    "logits_cap": 0.0,
    "embedding_scale": 1.0,
    "latent_size": None,
    "layer_kinds": [],
}


def check_trained(config: ModelConfig) -> None:
    """Raises TrainError naming what of a configuration is served but not trained."""
    for name, trained in TRAINED_FIELDS.items():
        if (value := getattr(config, name)) != trained:
            raise TrainError(f"[model] {name} is {value!r}; trained: {trained!r}")
    if config.hidden_act == "gelu_tanh":
        raise TrainError(f"[model] hidden_act is {config.hidden_act!r}; trained: 'gelu', 'silu'")
    if isinstance(config.ffn, MoeConfig) and config.ffn.shared_expert is not None:
        raise TrainError("[model] ffn.shared_expert is given; trained: mixtures without one")
    if isinstance(config.ffn, MoeConfig) and not config.ffn.is_plain:
        raise TrainError("[model] ffn picks experts otherwise than by a softmax over all; trained: by that alone")


def _check_budget(config: ModelConfig, budget: BudgetSettings) -> None:
    total, active = parameter_counts(config)
    name, asked, found = "active", budget.active, active
    if budget.kind == "dense":
        name, asked, found = "total", budget.total, total
    if abs(found / asked - 1) <= BUDGET_OFF:
        return
    plain = {
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "mlp_gated": False,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "attention_bias": False,
        "attention_output_bias": False,
    }
    others = [f"{field} = {value}" for field in plain if (value := getattr(config, field)) != plain[field]]
    raise TrainError(
        f"[budget] {name} is {asked:g} parameters, but the model has {found:,}: the solver counts learned positions, "
        "LayerNorm, two matrices an MLP, ungrouped queries and no biases; "
        f"here {', '.join(others) or 'the sizes are too small for it'}"
    )


def load_settings(source: Path, changes: Sequence[str] = ()) -> TrainSettings:
    """Read and check a TOML file, with fields replaced by "section.field=value".

    Raises ConfigError naming the field that is wrong.
    """
    try:
        content = parse_toml(read_document(source))
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except DocumentError as error:
        raise ConfigError(f"{source}: not readable TOML: {error}") from None
    for change in changes:
        _change(content, change)
    return checked_settings(content, str(source))


def checked_settings(content: dict[str, Any], source: str) -> TrainSettings:
    """The settings in a mapping as TOML or JSON give it. Raises ConfigError naming the field."""
    try:
        return TrainSettings.model_validate(_with_tuples(content))
    except ValidationError as error:
        raise ConfigError(f"{source}: {one_line(error)}") from None


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _change(content: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    *sections, field = path.split(".")
    if not equals or not sections or not field:
        raise ConfigError(f"--set {change}: expected SECTION.FIELD=VALUE, such as run.seed=1")
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {change}: {section} is not a section")
    try:
        target[field] = parse_json(text)
    except DocumentError:
        target[field] = text


def preset_file(name: str) -> Path:
    """The TOML file of a preset that ships with the package. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; allowed: {', '.join(PRESETS)}")
    return Path(__file__).parent / "presets" / f"{name}.toml"
