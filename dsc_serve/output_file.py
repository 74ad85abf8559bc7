"""Options that name a file: one to write, or a text to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class OutputFile(click.Path):
    """A file to be written, in a folder that is there: said before the work whose result it is to hold."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]  # as path_type says
        if not path.resolve().parent.is_dir():
            self.fail(f"{path}: its folder does not exist", param, ctx)
        return path


OUTPUT_FILE = OutputFile()
TEXT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
