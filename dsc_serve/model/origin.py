"""Which family's checkpoint a model was made of: by its names and forms adapters of that model come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_serve.model.config import read_json

FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What a model was before it got the serving form."""

    content: Mapping[str, Any]  # the configuration under Hugging Face's field names, `architectures` among them
    path: Path  # of its file, for errors


def read_origin(folder: Path) -> Origin | None:
    """What the import of a folder of the serving form kept. Raises CheckpointError."""
    path = folder / FILE
    return Origin(read_json(path), path) if path.exists() else None


def write_origin(origin: Origin, folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(dict(origin.content), indent=2) + "\n", "utf8")
