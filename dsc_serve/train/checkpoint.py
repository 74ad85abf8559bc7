"""A run's state on disk: written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dsc_serve.train.clock import TrainingClock
from dsc_serve.train.settings import TrainError

FORMAT = 1  # of states; one more whenever an older version would read them wrongly; those without a number are of 1


def save_state(state: dict[str, Any], file: Path) -> None:
    """Write beside the old state, flush it to the disk, then take its name: a kill at any moment leaves one of both."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        torch.save({"format": FORMAT, **state}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, "utf8")
    part.replace(file)


def claim_folder(folder: Path, log: str, settings: Mapping[str, Any]) -> None:
    """Keep the settings with the run. Raises TrainError when a run with others has begun its log in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / "settings.json", json.dumps(settings, indent=2) + "\n"
    if not (folder / log).is_file():
        write_whole(file, text)
    elif not file.is_file() or file.read_text("utf8") != text:
        raise TrainError(f"{folder}: holds a run with other settings (settings.json); name another folder")


class Checkpoints:
    """Saves a run by `save` whenever so many seconds have passed since it was last saved, or began."""

    def __init__(self, clock: TrainingClock, every_s: float, save: Callable[[], None]) -> None:
        self._clock, self._every_s, self._save = clock, every_s, save
        self._saved = clock.spent

    def look(self) -> None:
        if self._clock.spent - self._saved > self._every_s:
            self._save()
            self._saved = self._clock.spent


def load_state(file: Path, device: torch.device) -> dict[str, Any] | None:
    """The state, or None where there is none yet. Raises TrainError when it cannot be read."""
    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TrainError(f"{file}: not a readable checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise TrainError(f"{file}: not a readable checkpoint: it holds a {type(state).__name__}")
    number = state.pop("format", FORMAT)
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise TrainError(
            f"{file}: format is {number!r}; this version reads 1 to {FORMAT}: a newer dsc-serve wrote it, install that"
        )
    return state
