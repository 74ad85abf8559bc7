"""A study of adapters: its stages in order, as many of them at a start as its time permits."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dsc_serve.model.checkpoint import open_source
from dsc_serve.train.adapt.branch_trainer import MODEL
from dsc_serve.train.adapt.tenants import Tenant, tenants_of
from dsc_serve.train.adapt.trainer import ADAPTERS
from dsc_serve.train.adaptation_study.matrix import BASE, HeldOutText, held_out
from dsc_serve.train.adaptation_study.mixed import MIXED
from dsc_serve.train.adaptation_study.plan import SMALL, EqualLora, StudyOptions, check_study, equal_lora, run_settings
from dsc_serve.train.adaptation_study.stages import (
    MADE_BY,
    MatrixStage,
    Stage,
    StudyPlace,
    import_stage,
    train_stage,
)
from dsc_serve.train.checkpoint import claim_folder
from dsc_serve.train.corpus import source_name
from dsc_serve.train.record import read_log
from dsc_serve.train.settings import TrainError

LOG = "log.jsonl"  # of a study's folder: a line for each stage that has ended, and each that was cut
MATRIX = "matrix"


class AdaptationStudy:
    """Trains and measures all kinds in one folder; started again it goes on where it stopped, within a stage too.

    base: the model that is adapted, called `name`. time_limit: seconds of this start. clock: as time.monotonic.
    Raises TrainError, CheckpointError and ConfigError in one line before anything is trained.
    """

    def __init__(
        self,
        base: Path,
        name: str,
        texts: Sequence[Path],
        folder: Path,
        options: StudyOptions,
        kinds: Sequence[str],
        *,
        time_limit: float | None,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.report = clock, report
        self.stop_at = None if time_limit is None else clock() + time_limit
        files = sorted(texts, key=source_name)
        named = {"base": name, "texts": [path.name for path in files], **options.to_dict()}
        claim_folder(folder, LOG, json.loads(json.dumps(named)))
        check_study(base, files, options, kinds, folder)
        self.given, self.folder, self.options, self.kinds = base, folder, options, list(kinds)
        model = folder / BASE if base.is_file() else base
        self.place = StudyPlace(folder, model, name, files, [source_name(file) for file in files], options)
        self.config = open_source(base).config
        settings = run_settings(options, "lora")
        self.engine = {
            "dtype": options.dtype,
            "threads": settings.threads,
            "context": settings.length,
            "max_running": 16,
        }
        for tenant in self.tenants:
            if (len(tenant.corpus.train) - 1) // settings.length < 2:
                size = len(tenant.corpus.train)
                raise TrainError(f"{tenant.name}: has {size} training tokens; windows of {settings.length} need more")

    @cached_property
    def tenants(self) -> list[Tenant]:
        """Each text's tokens, as every kind's training splits them."""
        settings = run_settings(self.options, "lora")
        tokenizer = self.folder / "tokenizer"
        return tenants_of(self.place.texts, settings, tokenizer, self.config.vocab_size, self.folder / "data")

    @cached_property
    def held(self) -> dict[str, HeldOutText]:
        """What the matrix is measured on."""
        length = run_settings(self.options, "lora").length
        return {own.name: held_out(own.corpus, length, self.options.windows) for own in self.tenants}

    def equal(self) -> dict[str, EqualLora]:
        """By kind the LoRA of about as many bytes beside it."""
        if "lora" not in self.kinds:
            return {}
        return {kind: equal_lora(self.config, self.options, kind) for kind in self.kinds if kind in SMALL}

    def further(self) -> list[EqualLora]:
        """Those of them that are not the study's LoRA itself."""
        return sorted(set(self.equal().values()) - {EqualLora(self.options.rank)})

    def stages(self) -> list[Stage]:
        place = self.place
        found: list[Stage] = [] if place.model == self.given else [import_stage(self.given, place)]
        found.append(self._matrix(BASE, place.model, None, [BASE]))
        for kind in self.kinds:
            model = self.folder / kind / MODEL if kind == "dsc" else place.model
            names = [MIXED] if kind == MIXED else place.names
            found += self._with_matrix(MADE_BY[kind](place), kind, model, names)
        for lora in self.further():
            found += self._with_matrix([train_stage(place, "lora", lora=lora)], lora.name, place.model, place.names)
        return found

    def _with_matrix(self, made: Sequence[Stage], kind: str, model: Path, names: Sequence[str]) -> list[Stage]:
        """What makes a kind's adapters, and its matrix. A kind that is measured is not made again if it has gone."""
        matrix = self._matrix(kind, model, self.folder / kind / ADAPTERS, names)
        return [matrix] if matrix.done() else [*made, matrix]

    def _matrix(self, kind: str, model: Path, adapters: Path | None, names: Sequence[str]) -> MatrixStage:
        file = self.folder / MATRIX / f"{kind}.json"
        return MatrixStage(f"measure {kind}", file, model, adapters, names, lambda: self.held, self.engine)

    def run(self) -> list[str]:
        """Work through the stages; returns the names of those that are not done."""
        stages = self.stages()
        for i, stage in enumerate(stages):
            if stage.done():
                continue
            expected, left = stage.expected(), None if self.stop_at is None else self.stop_at - self.clock()
            if left is not None and expected > left:
                self.report(f"{stage.name}: needs about {expected:.0f} s, {max(left, 0):.0f} s of the time are left")
                return [own.name for own in stages[i:] if not own.done()]
            self.report(f"{stage.name} ({i + 1} of {len(stages)})")
            began = self.clock()
            done = stage.run(self.stop_at)
            gc.collect()  # a trainer's gradients and moments, before the next one's
            self._log({"stage": stage.name, "done": done, "seconds": round(self.clock() - began, 2)})
            if not done:
                self.report(f"{stage.name}: cut by the time limit; it goes on from here")
                return [own.name for own in stages[i:] if not own.done()]
        return []

    def _log(self, line: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf8") as stream:
            stream.write(json.dumps(line) + "\n")

    def seconds_of(self, stage: str) -> float:
        """That a stage has taken at all starts."""
        return sum((float(line["seconds"]) for line in read_log(self.folder / LOG) if line["stage"] == stage), 0.0)
