"""What a run that trains adapters needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from dsc_serve.config import ConfigError
from dsc_serve.documents import DocumentError, parse_json
from dsc_serve.model.adapter import MODULES
from dsc_serve.model.config import one_line
from dsc_serve.model.peft.config import MAX_RANK
from dsc_serve.model.schema import Size, Strict
from dsc_serve.train.settings import MAX_SEED, Count, Positive, Share

Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
R = TypeVar("R", bound="AdapterRunSettings")


class AdapterRunSettings(Strict):
    """What runs of every kind have.

    steps: of the run, in each of which every adapter sees `rows` windows of `length` tokens of its own text. rate: the
    peak, after `warmup` steps; it falls to `final` of that by a cosine. clip: of each adapter's gradient. held_out: the
    share of every text that is never trained on. log_steps, evaluate_steps: between lines of the log, and looks at
    `evaluate_windows` held-out windows of every text. checkpoint_s: seconds between checkpoints.
    """

    steps: Size = 200
    length: Size = 256
    rows: Size = 4
    rate: Positive = 5e-4
    warmup: Count = 10
    final: Share = 0.1
    clip: Positive = 1.0
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count = 0
    log_steps: Size = 5
    evaluate_steps: Size = 50
    evaluate_windows: Size = 4
    checkpoint_s: Positive = 60.0


class LowRankSettings(AdapterRunSettings):
    """rank, alpha: of each adapter, whose scale is alpha / rank. modules: of every layer."""

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    alpha: Positive = 32.0
    modules: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = MODULES  # type: ignore[assignment]

    @model_validator(mode="after")
    def _modules(self) -> LowRankSettings:
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise ValueError(f"modules is {list(self.modules)}; expected different ones of {', '.join(MODULES)}")
        return self


class AdaptSettings(LowRankSettings):
    """One run of LoRA."""

    kind: Literal["lora"] = "lora"


class CoreSettings(LowRankSettings):
    """One run of LoRA-XS: cores of rank² numbers on the first singular vectors of the base's own weights."""

    kind: Literal["lora-xs"] = "lora-xs"
    rate: Positive = 2e-3


class BranchSettings(AdapterRunSettings):
    """One run of a DSC branch. rate: of the bank's atoms; its router's is ROUTER_FACTOR times that.

    tenant_factor: times rate, of the tenants' biases and scales. gamma: what scales begin with. losses: factors of the
    paper's terms of the branch, of which a bank that is frozen has the last two alone, each tenant its own.
    """

    kind: Literal["dsc"] = "dsc"
    rows: Size = 1
    rate: Positive = 6e-4
    tenant_factor: Positive = 5.0
    gamma: Positive = 0.1
    load: Factor = 0.01
    frame: Factor = 0.001
    budget: Factor = 0.01
    z: Factor = 1e-4
    signal_floor: Factor = 1.0


def adapt_settings(changes: Sequence[str]) -> AdaptSettings:
    """Those of LoRA; see `settings_of`."""
    return settings_of(AdaptSettings, changes)


def settings_of(kind: type[R], changes: Sequence[str]) -> R:
    """The defaults with fields replaced by "field=value"; lists have commas. Raises ConfigError naming the field."""
    content: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in kind.model_fields:
            raise ConfigError(f"--set {change}: expected FIELD=VALUE with one of {', '.join(kind.model_fields)}")
        if name == "modules":
            content[name] = tuple(part.strip() for part in text.split(","))
            continue
        try:
            content[name] = parse_json(text)
        except DocumentError:
            content[name] = text
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"--set: {one_line(error)}") from None
