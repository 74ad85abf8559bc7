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
    """What runs of every kind have."""

    steps: Size = 200  # of the run
    length: Size = 256  # tokens of a window
    rows: Size = 4  # windows that every adapter sees in a step, of its own text
    rate: Positive = 5e-4  # the peak, after the warm-up
    warmup: Count = 10  # steps
    final: Share = 0.1  # share of the peak that the rate falls to, by a cosine
    clip: Positive = 1.0  # of each adapter's gradient
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05  # the share of every text that is never trained on
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count = 0
    log_steps: Size = 5  # between lines of the log
    evaluate_steps: Size = 50  # between looks at held-out windows
    evaluate_windows: Size = 4  # of every text
    checkpoint_s: Positive = 60.0  # seconds between checkpoints


class LowRankSettings(AdapterRunSettings):
    """What runs of low-rank adapters have, each of which has the scale alpha / rank."""

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16  # of each adapter
    alpha: Positive = 32.0
    # of every layer
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
    """One run of a DSC branch."""

    kind: Literal["dsc"] = "dsc"
    rows: Size = 1
    rate: Positive = 6e-4  # of the bank's atoms; its router's is ROUTER_FACTOR times that
    tenant_factor: Positive = 5.0  # times rate, of the tenants' biases and scales
    gamma: Positive = 0.1  # what scales begin with
    load: Factor = 0.01  # a factor of one of the paper's terms of the branch, as the next three
    frame: Factor = 0.001
    budget: Factor = 0.01  # a bank that is frozen has this and z alone, each tenant its own
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
