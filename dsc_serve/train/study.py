"""The study: every FFN kind at equal active parameters on the same tokens, over several seeds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_serve.train.checkpoint import write_whole
from dsc_serve.train.settings import TrainError, TrainSettings
from dsc_serve.train.trainer import Trainer

PROBE_STEPS = 5
MARGIN = 0.85  # share of the time limit that the plan fills
EVALUATIONS = 10
MIN_STEPS = 20


@dataclass(frozen=True)
class StudyEntry:
    """One line of the study: an FFN kind, with its picks per token where it picks."""

    kind: str
    k: int | None

    @property
    def name(self) -> str:
        return self.kind if self.k is None else f"{self.kind}-k{self.k}"


def entries(depths: Sequence[int]) -> list[StudyEntry]:
    return [
        *(StudyEntry("dsc", k) for k in depths),
        StudyEntry("moe", 2),
        StudyEntry("molora", 2),
        StudyEntry("dense", None),
    ]


class Study:
    """Runs every entry with every seed in one folder; started again it goes on where it stopped.

    time_limit: seconds for everything; the number of steps is planned from it, by each entry's measured speed, and
    kept in plan.json. Without one every run takes the settings' steps.
    """

    def __init__(
        self,
        settings: TrainSettings,
        texts: Sequence[Path],
        folder: Path,
        *,
        seeds: Sequence[int],
        depths: Sequence[int],
        time_limit: float | None,
        report: Callable[[str], None],
    ) -> None:
        if settings.budget is None:
            raise TrainError("a study needs [budget]: it gives every FFN kind its sizes")
        self.settings, self.budget, self.texts, self.folder = settings, settings.budget, texts, folder
        self.seeds, self.entries = list(seeds), entries(depths)
        self.limit, self.report = time_limit, report
        for entry in self.entries:
            self._settings_of(entry, self.seeds[0], settings.schedule.steps).model_config_for(None)

    def run(self) -> dict[str, Any]:
        """Train what is not trained yet; returns and writes results.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = self._plan()
        spent, runs, skipped = plan["spent"], [], []
        for seed in self.seeds:
            for entry in self.entries:
                trainer = self._trainer(entry, seed, plan["steps"])
                left = None if self.limit is None else self.limit - spent
                summary = trainer.run(give_up=left)
                if summary is None:
                    skipped.append(f"{entry.name}, seed {seed}")
                    spent += trainer.clock.spent
                    continue
                spent += summary["seconds"]
                runs.append({"entry": entry.name, "k": entry.k, "seed": seed, **summary})
                self.report(f"{entry.name}, seed {seed}: held-out loss {summary['held_out_loss']:.4f}")
        result = {"steps": plan["steps"], "seconds": round(spent, 1), "skipped": skipped, "runs": runs}
        write_whole(self.folder / "results.json", json.dumps(result, indent=2) + "\n")
        return result

    def folder_of(self, entry: str, seed: int) -> Path:
        return self.folder / f"{entry}-seed{seed}"

    def _settings_of(self, entry: StudyEntry, seed: int, steps: int) -> TrainSettings:
        budget = self.budget.model_copy(update={"kind": entry.kind, "k": entry.k})
        schedule = self.settings.schedule.model_copy(update={"steps": steps})
        run = self.settings.run.model_copy(update={"seed": seed, "evaluate_steps": max(1, steps // EVALUATIONS)})
        return self.settings.model_copy(update={"budget": budget, "schedule": schedule, "run": run})

    def _trainer(self, entry: StudyEntry, seed: int, steps: int, folder: Path | None = None) -> Trainer:
        settings = self._settings_of(entry, seed, steps)
        return Trainer(settings, self.texts, folder or self.folder_of(entry.name, seed), data=self.folder / "data")

    def _plan(self) -> dict[str, Any]:
        """The number of steps of every run, and the seconds that planning took."""
        file = self.folder / "plan.json"
        if file.is_file():
            plan: dict[str, Any] = json.loads(file.read_text("utf8"))
            return plan
        began, steps = time.monotonic(), self.settings.schedule.steps
        if self.limit is not None:
            per_step = fixed = 0.0
            for entry in self.entries:
                probe = self._trainer(entry, 0, steps, self.folder / "probe" / entry.name)
                step_s, evaluation_s, window_s = probe.measure(PROBE_STEPS)
                per_step += step_s
                fixed += evaluation_s + (EVALUATIONS + 1) * window_s
                self.report(f"{entry.name}: {step_s:.2f} s a step")
            room = MARGIN * (self.limit - (time.monotonic() - began)) / len(self.seeds)
            steps = int((room - fixed) / per_step)
            shutil.rmtree(self.folder / "probe")
            if steps < MIN_STEPS:
                raise TrainError(
                    f"the time limit leaves {max(steps, 0)} steps a run; allow more time or a smaller model"
                )
        plan = {"steps": steps, "spent": round(time.monotonic() - began, 1)}
        write_whole(file, json.dumps(plan) + "\n")
        return plan
