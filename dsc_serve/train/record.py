"""A run's log, JSON lines in the order of the steps, and its progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsc_serve.train.checkpoint import write_whole


class Record:
    """Appends to log.jsonl. Lines of steps after `step`, which a resumed run takes again, are dropped at the start."""

    def __init__(self, file: Path, step: int) -> None:
        self.lines = [line for line in read_log(file) if line["step"] <= step]
        write_whole(file, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._stream = file.open("a", encoding="utf8")

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill cut short is left out."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text("utf8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class Progress:
    """A bar of the run's share on a terminal; on anything else a line per log entry."""

    def __init__(self, share: float) -> None:
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=1.0,
            initial=round(min(share, 1.0), 6),
            disable=not self._live,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}",
        )

    def show(self, share: float, line: dict[str, Any]) -> None:
        words = ", ".join(f"{name} {value}" for name, value in line.items() if isinstance(value, int | float))
        if self._live:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(min(share, 1.0) - self._bar.n)
        else:
            print(f"{min(share, 1.0):6.1%} {words}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
