"""Which model a folder holds: a digest of the files that its tokens depend on, and whether they change meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsc_serve.gguf_file import open_gguf
from dsc_serve.model.checkpoint import weight_files
from dsc_serve.model.config import CheckpointError

# The chat template is the API process's, which reads it once; all else decides tokens, their ends or their texts.
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
READERS = 4

Stamp = tuple[int, ...] | None


def model_files(folder: Path) -> list[Path]:
    """Those that are there; of a GGUF file all its parts."""
    if folder.is_file():
        with contextlib.suppress(CheckpointError):
            return sorted({entry.file for entry in open_gguf(folder).tensors} | {folder})
        return [folder]
    weights: list[Path] = []
    with contextlib.suppress(CheckpointError):  # which loading them tells better
        weights = weight_files(folder)
    return [path for path in (folder / name for name in OTHER_FILES) if path.is_file()] + weights


def stamp(path: Path) -> Stamp:
    """What changes when a file is written to, cut or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(path: Path) -> str:
    """Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error}") from None


class Fingerprint:
    """Made before a model is loaded, and taken when it has been."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._look()

    def take(self) -> str:
        """The same for the same model, whatever its folder is called and whenever it was written.

        Raises CheckpointError where a file cannot be read, or has changed since: what was loaded may be part of each.
        """
        files = model_files(self._folder)
        with ThreadPoolExecutor(READERS) as readers:
            lines = [f"{path.name} {found}\n" for path, found in zip(files, readers.map(digest_of, files), strict=True)]
        now = self._look()
        for name in sorted(now.keys() | self._before.keys()):
            if now.get(name) != self._before.get(name):
                path = self._folder.with_name(name) if self._folder.is_file() else self._folder / name
                raise CheckpointError(f"{path}: changed while the model was being loaded; load it again")
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def _look(self) -> dict[str, Stamp]:
        return {path.name: stamp(path) for path in model_files(self._folder)}
