"""What all readers of model files share: the error, and the files that are not what their names say."""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; one line that names the file, the field or tensor, and what is expected."""


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError where a file is what Git leaves in place of one that it keeps elsewhere."""
    if not path.is_file():  # opening a pipe would wait for whoever writes to it
        return
    try:
        with path.open("rb") as stream:
            beginning = stream.read(len(POINTER))
    except OSError:
        return  # who reads it says so
    if beginning == POINTER:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; git lfs pull fetches it")
