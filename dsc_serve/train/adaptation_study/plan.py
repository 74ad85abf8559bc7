"""What a study of adapters runs: its kinds, their settings, and how many bytes a tenant of each takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsc_serve.config import ConfigError
from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.model.graft import check_base as check_graft
from dsc_serve.model.graft import layers_of
from dsc_serve.train.adapt.kinds import KINDS, TrainedKind
from dsc_serve.train.adapt.settings import AdapterRunSettings, LowRankSettings, settings_of
from dsc_serve.train.adapt.trainer import check_base, tokenizer_of
from dsc_serve.train.adaptation_study.mixed import MIXED, MixedSettings, MixedTrainer
from dsc_serve.train.corpus import source_name
from dsc_serve.train.settings import TrainError

SHARED = "shared"
STUDIED = {
    "lora": "LoRA",
    "lora-xs": "LoRA-XS",
    SHARED: "cores on a shared basis",
    "dsc": "tenants of a DSC branch",
    MIXED: "one LoRA of all texts",
}
TRAINED = {**KINDS, MIXED: TrainedKind(MixedSettings, MixedTrainer)}
SMALL = ("lora-xs", SHARED, "dsc")  # kinds beside which a LoRA of as many bytes stands
GIVEN = {
    "steps": "--tokens gives it",
    "rank": "--rank gives it",
    "alpha": "the study takes twice the rank",
    "kind": "--kinds gives it",
}
FOR_ALL = ("length", "held_out", "seed", "threads")  # that kinds cannot differ in
NARROW = (("q",), ("q", "v"), ("q", "k", "v", "o"))  # modules of LoRAs that are smaller than one of rank 1 of all
STORED = 2  # bytes of a number of matrices: bfloat16
WIDE = 4  # of biases and scales: float32


@dataclass(frozen=True)
class StudyOptions:
    """What a study is of."""

    tokens: int = 100_000  # that each text is trained on
    rank: int = 16  # of LoRA and LoRA-XS
    basis: int = 32  # directions of what LoRAs share
    atoms: int = 1024  # of the DSC branch
    picks: int = 4  # likewise
    layers: str = ""  # likewise
    windows: int = 24  # held-out ones of each text, at most
    dtype: str = "auto"  # that they are computed in
    changes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "changes": list(self.changes)}


def kinds_of(text: str) -> list[str]:
    """The kinds that a list names, in the study's order. Raises ConfigError."""
    named = [word.strip() for word in text.split(",")]
    if unknown := [name for name in named if name not in STUDIED]:
        raise ConfigError(f"--kinds has {unknown[0]!r}; expected some of {','.join(STUDIED)}")
    if len(set(named)) < len(named):
        raise ConfigError(f"--kinds is {text!r}; each is named once")
    if SHARED in named and "lora" not in named:
        raise ConfigError(f"--kinds is {text!r}; {SHARED} is made of the LoRAs: name lora, too")
    return [name for name in STUDIED if name in named]


def changes_of(changes: Sequence[str], kind: str) -> list[str]:
    """Those of "FIELD=VALUE" and "KIND.FIELD=VALUE" that are for a kind of TRAINED. Raises ConfigError."""
    found = []
    for change in changes:
        name, equals, value = change.partition("=")
        own, dot, field = name.rpartition(".")
        if dot and own not in TRAINED:
            raise ConfigError(f"--set {change}: {own!r} is no kind; expected one of {', '.join(TRAINED)}")
        if field in GIVEN:
            raise ConfigError(f"--set {change}: {GIVEN[field]}")
        if dot and field in FOR_ALL:
            raise ConfigError(f"--set {change}: kinds are compared at one {field}; give it without {own!r}")
        having = {name for name, trained in TRAINED.items() if field in trained.settings.model_fields}
        if not dot and not having:
            raise ConfigError(f"--set {change}: {field!r} is no setting of any kind")
        if own == kind or (not dot and kind in having):
            found.append(f"{field}{equals}{value}")
    return found


def run_settings(options: StudyOptions, kind: str, lora: EqualLora | None = None) -> AdapterRunSettings:
    """Of a kind of TRAINED, or of a LoRA of another size. Raises ConfigError."""
    own, given = TRAINED[kind].settings, changes_of(options.changes, kind)
    rank = options.rank if lora is None else lora.rank
    if issubclass(own, LowRankSettings):
        given += [f"rank={rank}", f"alpha={2 * rank}"]
    if lora is not None and lora.modules:
        given.append(f"modules={','.join(lora.modules)}")
    settings = settings_of(own, given)
    steps = math.ceil(options.tokens / (settings.rows * settings.length))
    return settings.model_copy(update={"steps": steps})


def rank_bytes(config: ModelConfig, modules: Sequence[str], rank: int) -> int:
    """Of a LoRA, or of a basis, which has no more directions than a module's shorter side."""
    shapes = [shape for key, shape in module_shapes(config).items() if key[1] in modules]
    return STORED * sum(min(rank, *shape) * sum(shape) for shape in shapes)


def core_bytes(config: ModelConfig, modules: Sequence[str], rank: int) -> int:
    """Of cores on a basis of so many directions."""
    shapes = [shape for key, shape in module_shapes(config).items() if key[1] in modules]
    return STORED * sum(min(rank, *shape) ** 2 for shape in shapes)


def tenant_bytes(config: ModelConfig, options: StudyOptions, kind: str) -> int:
    """What a tenant takes of its own, in memory."""
    if kind == "dsc":
        layers = len(layers_of(options.layers, config.num_hidden_layers))
        return WIDE * layers * (options.atoms + config.hidden_size)
    settings = run_settings(options, "lora" if kind == SHARED else kind)
    assert isinstance(settings, LowRankSettings)
    if kind == "lora-xs":
        return core_bytes(config, settings.modules, options.rank)
    if kind == SHARED:
        return core_bytes(config, settings.modules, options.basis)
    return 0 if kind == MIXED else rank_bytes(config, settings.modules, options.rank)


def shared_bytes(config: ModelConfig, options: StudyOptions, kind: str) -> int:
    """What all tenants of a kind have in common beside the base."""
    if kind == "dsc":
        layers = len(layers_of(options.layers, config.num_hidden_layers))
        return STORED * layers * 3 * options.atoms * config.hidden_size
    settings = run_settings(options, "lora" if kind == SHARED else kind)
    assert isinstance(settings, LowRankSettings)
    if kind == "lora":
        return 0
    return rank_bytes(config, settings.modules, options.basis if kind == SHARED else options.rank)


@dataclass(frozen=True, order=True)
class EqualLora:
    """A LoRA that takes about as many bytes as a tenant of another kind."""

    rank: int
    modules: tuple[str, ...] = ()  # fewer than all, where rank is 1

    @property
    def name(self) -> str:
        return f"lora-r{self.rank}{'-' if self.modules else ''}{''.join(self.modules)}"

    @property
    def title(self) -> str:
        return f"LoRA of rank {self.rank}{' of ' if self.modules else ''}{', '.join(self.modules)}"


def lora_bytes(config: ModelConfig, options: StudyOptions, lora: EqualLora) -> int:
    settings = run_settings(options, "lora")
    assert isinstance(settings, LowRankSettings)
    return rank_bytes(config, lora.modules or settings.modules, lora.rank)


def equal_lora(config: ModelConfig, options: StudyOptions, kind: str) -> EqualLora:
    """The nearest in bytes to a tenant of a kind: of a rank, and where rank 1 is too much already, of fewer modules."""
    settings, size = run_settings(options, "lora"), tenant_bytes(config, options, kind)
    assert isinstance(settings, LowRankSettings)
    whole = EqualLora(max(1, round(size / rank_bytes(config, settings.modules, 1))))
    fewer = [EqualLora(1, own) for own in NARROW if set(own) < set(settings.modules)]
    return min([whole, *fewer], key=lambda lora: abs(math.log(lora_bytes(config, options, lora) / size)))


def check_study(base: Path, texts: Sequence[Path], options: StudyOptions, kinds: Sequence[str], folder: Path) -> None:
    """Raises TrainError, CheckpointError and ConfigError before anything is trained."""
    if len(texts) < 2:
        raise TrainError(f"{len(texts)} text is given; a study of tenants compares at least 2, each a file")
    if SHARED in kinds and options.basis > len(texts) * options.rank:
        most = f"{len(texts)} LoRAs of rank {options.rank} have {len(texts) * options.rank} directions"
        raise ConfigError(f"--basis is {options.basis}; {most}, and a basis of more leaves nothing out")
    if MIXED in map(source_name, texts):
        raise TrainError(f"a text is called {MIXED!r}, as the adapter of all texts is; give its file another name")
    for kind in TRAINED:
        run_settings(options, kind)
    source = open_source(base)
    check_base(source, run_settings(options, "lora").length)
    if not isinstance(source.config.ffn, DenseConfig):
        raise TrainError(f"the base's ffn.kind is {source.config.ffn.kind!r}; adapters are trained of: 'dense'")
    layers_of(options.layers, source.config.num_hidden_layers)
    if options.picks > options.atoms:
        raise ConfigError(f"--picks is {options.picks}, of --atoms {options.atoms}; expected at most as many")
    if "dsc" in kinds:
        check_graft(source)
    tokenizer_of(source, folder / "tokenizer")
