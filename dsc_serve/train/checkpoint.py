"""A run's state on disk: written whole or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

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
