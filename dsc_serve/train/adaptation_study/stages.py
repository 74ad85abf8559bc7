"""The stages of a study of adapters: each leaves a whole result in the study's folder, by which it is known as done."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import module_shapes
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.cores.files import read_cores
from dsc_serve.model.cores.share import share
from dsc_serve.model.gguf import import_gguf
from dsc_serve.model.graft import graft
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.train.adapt.settings import AdapterRunSettings
from dsc_serve.train.adapt.trainer import ADAPTERS, AdapterTrainer
from dsc_serve.train.adaptation_study.matrix import HeldOutText, Rows, expected_seconds, measure_rows
from dsc_serve.train.adaptation_study.mixed import MIXED
from dsc_serve.train.adaptation_study.plan import SHARED, TRAINED, EqualLora, StudyOptions, run_settings
from dsc_serve.train.checkpoint import write_whole

GRAFTED = "grafted"
CERTIFICATES = "certificates.json"
SHORT_S = 90.0  # that stages without steps are expected to take
LEAST_S = 120.0  # that a stage with steps must have to begin: it prepares, takes some, and is cut at a checkpoint
REFUSED = 0.5  # --max-error of the case that must be refused
SPREAD = 4  # times as many directions as a basis has, at least, that this case's adapters have together


@dataclass(frozen=True)
class StudyPlace:
    """What all stages work on."""

    folder: Path
    model: Path  # the base as it is trained and served
    name: str  # what adapters call it
    texts: Sequence[Path]
    names: Sequence[str]
    options: StudyOptions


class Stage(Protocol):
    """One part of a study."""

    @property
    def name(self) -> str: ...

    def done(self) -> bool:
        """Whether its result is there."""

    def expected(self) -> float:
        """Seconds that must be left for it to begin."""

    def run(self, stop_at: float | None) -> bool:
        """Work, until this time of time.monotonic() at most; returns whether it is done."""


@dataclass(frozen=True)
class WrittenStage:
    """Writes a folder or a file, whole or not at all, from a function of the path to write."""

    name: str
    path: Path
    write: Callable[[Path], object]
    least_s: float = SHORT_S

    def done(self) -> bool:
        return self.path.exists()

    def expected(self) -> float:
        return self.least_s

    def run(self, stop_at: float | None) -> bool:
        part = self.path.with_name(f"{self.path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
        self.write(part)
        part.replace(self.path)
        return True


@dataclass(frozen=True)
class TrainStage:
    """Trains adapters of all texts in a folder of its own, by the steps that the tokens need."""

    name: str
    folder: Path
    trainer: Callable[..., AdapterTrainer]
    settings: AdapterRunSettings
    base: Path
    place: StudyPlace

    def done(self) -> bool:
        return (self.folder / "summary.json").is_file()

    def expected(self) -> float:
        return LEAST_S

    def run(self, stop_at: float | None) -> bool:
        place = self.place
        trainer = self.trainer(self.settings, self.base, place.texts, self.folder, place.name, prepared=place.folder)
        trainer.final_windows = self.settings.evaluate_windows  # the matrix measures the end
        return trainer.run(stop_at=stop_at) is not None


@dataclass(frozen=True)
class MatrixStage:
    """Measures every adapter of a kind on every text."""

    name: str
    file: Path
    model: Path
    adapters: Path | None
    names: Sequence[str]
    texts: Callable[[], Mapping[str, HeldOutText]]  # held-out ones, when they are asked for
    engine: Mapping[str, Any]

    def done(self) -> bool:
        return not set(self.names) - Rows.read(self.file).bits.keys()

    def expected(self) -> float:
        tokens = sum(own.tokens for own in self.texts().values())
        return expected_seconds(sorted(self.file.parent.glob("*.json")), tokens)

    def run(self, stop_at: float | None) -> bool:
        rows = Rows.read(self.file)
        return measure_rows(
            rows, self.model, self.adapters, self.names, self.texts(), self.engine, self.expected(), stop_at
        )


def import_stage(given: Path, place: StudyPlace) -> WrittenStage:
    """A GGUF file's weights in bfloat16, so that all that follows is of the same numbers."""
    return WrittenStage("import the base", place.model, lambda out: import_gguf(given, out, torch.bfloat16))


def train_stage(place: StudyPlace, kind: str, base: Path | None = None, lora: EqualLora | None = None) -> TrainStage:
    """lora: of another size, in a folder of its name."""
    name = kind if lora is None else lora.name
    settings = run_settings(place.options, kind, lora)
    return TrainStage(f"train {name}", place.folder / name, TRAINED[kind].trainer, settings, base or place.model, place)


def graft_stage(place: StudyPlace) -> WrittenStage:
    o = place.options
    return WrittenStage(
        "graft the branch",
        place.folder / GRAFTED,
        lambda out: graft(place.model, out, o.atoms, o.picks, o.layers),
    )


def share_stage(place: StudyPlace) -> WrittenStage:
    """A basis of the trained LoRAs and cores on it, which tell what it leaves out."""
    folders = [place.folder / "lora" / ADAPTERS / name for name in place.names]
    return WrittenStage(
        "share a basis",
        place.folder / SHARED,
        lambda out: share(folders, out / ADAPTERS, place.options.basis, None),
    )


def certificates_stage(place: StudyPlace) -> WrittenStage:
    return WrittenStage("read certificates", place.folder / CERTIFICATES, lambda out: certificates(place, out))


def certificates(place: StudyPlace, out: Path) -> None:
    """By tenant what the shared basis leaves out of its LoRA: as shares of the updates' spectral norms."""
    found = {}
    for name in place.names:
        own = read_cores(place.folder / SHARED / ADAPTERS / name).certificate.values()
        shares = [one.share for one in own]
        found[name] = {
            "median_share": round(median(shares), 6),
            "largest_share": round(max(shares), 6),
            "largest_error": round(max(one.error for one in own), 6),
        }
    write_whole(out, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def refusal_stage(place: StudyPlace) -> WrittenStage:
    return WrittenStage("refuse unaligned adapters", place.folder / "refusal.json", lambda out: refusal(place, out))


def refusal(place: StudyPlace, out: Path) -> None:
    """Adapters of random numbers have no directions in common: tell what `adapter share` says of them.

    So many of them, of the first layer's modules, that a basis has a quarter of their directions at most.
    """
    rank, basis = place.options.rank, place.options.basis
    count = max(len(place.names), math.ceil(SPREAD * basis / rank))
    source, folder = open_source(place.model), place.folder / "unaligned"
    shutil.rmtree(folder, ignore_errors=True)
    modules = Base(source.config, source.origin).modules
    shapes = {
        name: (own.out, own.into)
        for name, own in modules.items()
        if own.parts[0][0][0] == 0 and own.parts[0][0] in module_shapes(source.config)
    }
    generator = torch.Generator().manual_seed(0)
    folders = []
    for i in range(count):
        made = {
            name: Matrices(
                torch.randn(rank, into, generator=generator) * into**-0.5,
                torch.randn(size, rank, generator=generator) * rank**-0.5,
            )
            for name, (size, into) in shapes.items()
        }
        folders.append(folder / f"random-{i}")
        write_adapter(folders[-1], place.name, float(rank), made)
    found = share(folders, folder / "on-basis", basis, None)
    told: dict[str, Any] = {"adapters": count, "rank": rank, "basis": basis, "max_error": REFUSED}
    shares = [one.share for own in found.adapters.values() for one in own.certificate.values()]
    told |= {"left_out": [round(min(shares), 5), round(median(shares), 5), round(max(shares), 5)]}
    try:
        share(folders, folder / "on-basis-within", basis, REFUSED)
        told |= {"refused": False, "said": ""}
    except CheckpointError as error:
        told |= {"refused": True, "said": str(error)}
    shutil.rmtree(folder)
    write_whole(out, json.dumps(told, indent=2) + "\n")


MADE_BY: Mapping[str, Callable[[StudyPlace], Sequence[Stage]]] = {
    "lora": lambda place: [train_stage(place, "lora")],
    "lora-xs": lambda place: [train_stage(place, "lora-xs")],
    SHARED: lambda place: [share_stage(place), certificates_stage(place), refusal_stage(place)],
    "dsc": lambda place: [graft_stage(place), train_stage(place, "dsc", place.folder / GRAFTED)],
    MIXED: lambda place: [train_stage(place, MIXED)],
}
